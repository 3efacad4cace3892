"""A dozen short rows and the configuration of a training on them, for tests of the pipeline."""

import json
from pathlib import Path
from typing import Any

from swlora.config import RunSpec, load_spec

ROWS = [
    {"prompt": f"name[{name}], food[{food}]\n", "completion": f"{name} {verb} {food}."}
    for name, food in (("A", "x"), ("Bo", "yy"), ("Cem", "z"), ("Dora", "xx"))
    for verb in ("has", "serves", "is the place for")
]
DEV = [{"prompt": "name[E], food[x]\n", "completion": f"E {verb} x."} for verb in ("has", "sells")]


def write_data(folder: Path) -> dict[str, str]:
    """Write ROWS and DEV as files; return the settings that name them."""
    for name, rows in (("train", ROWS), ("dev", DEV)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return {"data.name": f"{folder}/train.jsonl", "data.eval_file": f"{folder}/dev.jsonl"}


def make_spec(
    model: Path, data: dict[str, str], *, method: str = "lora", **changes: Any
) -> RunSpec:
    """Two epochs of four steps in the layers 1 and 2 of 3."""
    settings: dict[str, Any] = {
        "model.name": str(model),
        "model.device": "cpu",
        "model.dtype": "float32",
        "adapter.method": method,
        "adapter.layers": "last:2",
        "train.epochs": 2,
        "train.batch_size": 3,
        "train.learning_rate": 0.01,
    }
    sizes = {"full": {}, "supertuning": {"adapter.sparsity": 0.9}}
    settings |= sizes.get(method, {"adapter.rank": 3})
    return load_spec(None, data | settings | {k.replace("__", "."): v for k, v in changes.items()})
