"""Run folders in which a file is something else than it should be, and the routes beside them."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from swlora.bounded_read import MAX_DEPTH

DEEP = "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)
RUN = {"status": "done", "command": "train", "started_at": "2030-01-01T10:00:00Z"}
STUDY = {"status": "done", "arms": {}, "runs": {}}
ADAPTER = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
WHOLE = {
    "run.json": RUN,
    "study.json": STUDY,
    "adapter_config.json": ADAPTER,
    "swlora.json": {"layers": [1], "separator": "\n"},
    "result.json": {"train": {"last_loss": 1.0}},
    "results.json": {"arms": []},
    "metrics.jsonl": {"step": 1, "loss": 1.0},
    "config.yaml": {"model": {"name": "tiny"}},
    "predictions.csv": "mr,prediction\na,b\n",
}
TEXTS = {
    "deep": DEEP,
    "list": "[1, 2]",
    "null": "null",
    "infinite": '{"status": "done", "command": "train", "timings_s": {"total": 1e999}}',
    "many digits": '{"r": ' + "9" * 5000 + "}",
    "no text": b"\xff\xfe\x00",
    "empty": "",
}
KINDS = [*TEXTS, "pipe", "folder", "link", "link to itself"]
ROUTES = ["/", "/runs", "/runs?all=1", "/runs/good", "/studies/good", "/super-weights"]
API = ["/api/models", "/api/runs", "/v1/models", "/health", "/ready", "/metrics"]
ABOUT = ["/runs/{}", "/studies/{}", "/super-weights?run={}"]
API_ABOUT = ["/api/run?name={}", "/api/run/metrics?name={}", "/api/run/figure?name={}&file=a.png"]


def make_folder(folder: Path) -> Path:
    """Write a folder with every file that is read."""
    folder.mkdir(parents=True)
    for name, value in WHOLE.items():
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def spoil(path: Path, kind: str, good: Path) -> None:
    """Put something else into the place of a file."""
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind.startswith("link"):
        path.symlink_to(path if "itself" in kind else good / path.name)
    else:
        text = TEXTS[kind]
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def spoiled_folders(
    root: Path, kinds: Iterable[str] = KINDS, files: Iterable[str] = tuple(WHOLE)
) -> dict[str, tuple[str, str]]:
    """Write root/good and beside it a folder for every file and kind; return their names."""
    good, kinds = make_folder(root / "good"), list(kinds)
    bad = {f"{file}-{kind}": (file, kind) for file in files for kind in kinds}
    for name, (file, kind) in bad.items():
        spoil(make_folder(root / name) / file, kind, good)
    return bad


def wrong_answers(client: Any, names: Iterable[str]) -> Iterator[str]:
    """Ask for every page and every route, and for those of each folder; yield "" for an answer as
    it should be, else what came instead.
    """
    pages = [(path, (200,)) for path in ROUTES]
    api = [(path, (200,)) for path in API]
    for name in names:
        pages += [(path.format(name), (200, 404)) for path in ABOUT]
        api += [(path.format(name), (200, 404)) for path in API_ABOUT]
    for paths, headers in ((pages, {"accept": "text/html"}), (api, {})):
        for path, statuses in paths:
            response = client.get(path, headers=headers)
            is_good = response.status_code in statuses
            yield "" if is_good else f"{path}: {response.status_code} {response.text[:200]}"
