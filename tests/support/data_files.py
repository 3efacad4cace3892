"""Data files as people have them: JSONL, CSV, and a folder like that of the E2E data."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swlora.data.examples import Example

E2E = {
    "trainset.csv": [("name[A], food[x]", "A, with “x”."), ("name[B]", " B\nis here.")],
    "devset.csv": [("name[C]", "C."), ("name[D]", "D."), ("name[C]", "See C.")],
    "testset_w_refs.csv": [("name[É]", "É."), ("name[F]", "F."), ("name[F]", "Eff.")],
}


def as_csv(rows: list[tuple[str, ...]], newline: str = "\r\n") -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=newline, quoting=csv.QUOTE_ALL).writerows(rows)
    return text.getvalue().encode()


def as_jsonl(rows: list[tuple[str, str]]) -> bytes:
    return b"".join(
        json.dumps({"prompt": p, "completion": c}, ensure_ascii=False).encode() + b"\n"
        for p, c in rows
    )


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def write_e2e(folder: Path) -> str:
    folder.mkdir()
    for name, rows in E2E.items():
        write(folder / name, as_csv([("mr", "ref"), *rows]))
    return str(folder)


def examples(rows: list[tuple[str, str]]) -> tuple[Example, ...]:
    return tuple(Example(*row) for row in rows)


def numbered(n_prompts: int) -> list[tuple[str, str]]:
    """Two rows for each prompt, the second ones in another order."""
    first = [(f"prompt {i}", f"first {i}") for i in range(n_prompts)]
    return first + [(f"prompt {i}", f"second {i}") for i in reversed(range(n_prompts))]
