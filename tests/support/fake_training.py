"""Stands in for `python -m swlora` behind the page's trainings: quick, and led by the test.

It notes its arguments in `said.json` beside the file, and does what the argument it was given says:
train (until it is told to stop, or at once with --epochs=1), data, merge, export.
"""

import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROW = {
    "place": "/srv/secret/rows.jsonl, line 1",
    "n_sequences": 1,
    "sequences": [
        {
            "n_tokens": 4,
            "n_trained_tokens": 2,
            "spans": [
                {"text": "<b>Hi</b>\n", "weight": 0.0, "is_special": False},
                {"text": "you", "weight": 1.0, "is_special": False},
                {"text": "</s>", "weight": 1.0, "is_special": True},
            ],
        }
    ],
}
SPLIT = {
    **{"split": "train", "n_rows": 7, "n_sequences": 7, "n_tokens": 70, "n_trained_tokens": 30},
    **{"trained_share": 0.43, "median_tokens": 9, "p95_tokens": 12, "longest_tokens": 14},
    **{"context_tokens": 512, "n_cut": 1, "n_prompts": 5, "n_rows_sharing": 3},
}
LOOK = {
    **{"model": "tiny", "data": "rows of rows.jsonl", "refused": [], "shown": [ROW]},
    **{"train": SPLIT, "n_duplicates": 0, "n_leaked": 0, "bad_rows": {"no prompt": 2}},
}
ESTIMATE = {
    **{"time": {"train_s": 125.0}, "n_steps": 1200, "memory": {"peak_bytes": 2_500_000_000}},
    **{"layers": [1, 2], "n_trainable": 4608, "disk": {"checkpoints": 2_000_000, "adapter": 10}},
    **{"refused": "/tmp/runs: the disk has less room; use fewer --epochs"},
}


def main() -> None:
    what, flags = sys.argv[1], dict(part.partition("=")[::2] for part in sys.argv[2:])
    note = Path(__file__).with_name("said.json")
    key = os.environ.get("SWLORA_API_KEY", "")
    scratch = note.with_suffix(".new")
    scratch.write_text(json.dumps({"arguments": sys.argv[1:], "key": key}))
    scratch.replace(note)
    {"train": _train, "data": _data, "merge": _merge, "export": _export}[what](flags)


def _train(flags: dict[str, str]) -> None:
    if "--dry-run" in flags:
        end_s = time.monotonic() + 60
        while Path(__file__).with_name("hold").exists() and time.monotonic() < end_s:
            time.sleep(0.01)
        _write(Path(flags["--json"]), ESTIMATE)
        return
    folder = Path(flags["--output"])
    fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX)  # as a run is at work in it
    if "broken" in flags.get("--dataset", ""):
        sys.exit(f"swlora: {flags['--dataset']}, line 2: no prompt")
    if "--resume" in flags and (folder / "refuse").exists():
        sys.exit(f"swlora: {folder}: torch was 1 and is now 2; --force-resume goes on")
    config = {"data": {"name": flags.get("--dataset")}, "model": {"name": flags.get("--model")}}
    if "--resume" not in flags:
        _write(folder / "config.yaml", config)
    facts: dict[str, Any] = {"command": "train", "started_at": "2030-01-01T10:00:00Z"}
    _write(folder / "run.json", facts | {"status": "running"})
    (folder / "checkpoint").mkdir(exist_ok=True)
    _write(folder / "checkpoint/state-1.json", {})
    if flags.get("--epochs") != "1" and "--resume" not in flags:
        stopped: list[int] = []
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
        _write(folder / "ready", {})
        end_s = time.monotonic() + 60
        while not stopped and time.monotonic() < end_s:
            time.sleep(0.01)
        _write(folder / "run.json", facts | {"status": "cancelled", "reason": "it was stopped"})
        sys.exit(130)
    save_adapter(folder, b"more weights" if "--resume" in flags else b"weights")
    _write(folder / "run.json", facts | {"status": "done"})


def _data(flags: dict[str, str]) -> None:
    if "broken" in flags["--dataset"]:
        sys.exit(f"swlora: {flags['--dataset']}: name yours with --columns")
    if "slow" in flags["--dataset"]:
        time.sleep(60)
    _write(Path(flags["--json"]), LOOK)


def save_adapter(folder: Path, weights: bytes) -> None:
    """Write the adapter of a run, with what it notes of its weights."""
    (folder / "adapter").mkdir(parents=True, exist_ok=True)
    (folder / "adapter/adapter_model.safetensors").write_bytes(weights)
    digest = hashlib.sha256(weights).hexdigest()
    _write(folder / "adapter/swlora.json", {"sha256": {"adapter_model.safetensors": digest}})


def _merge(flags: dict[str, str]) -> None:
    weights = (Path(flags["--adapter"]) / "adapter/adapter_model.safetensors").read_bytes()
    Path(flags["--output"]).mkdir()
    report = {"adapter_sha256": hashlib.sha256(weights).hexdigest()}
    _write(Path(flags["--output"]) / "swlora-merge.json", report)


def _export(flags: dict[str, str]) -> None:
    if flags["--type"] == "f16":
        sys.exit("swlora: /somewhere/else: the disk is full")
    report = json.loads((Path(flags["--model"]) / "swlora-merge.json").read_text())
    noted = {"merged_adapter_sha256": report["adapter_sha256"]}
    with Path(flags["--gguf"]).open("xb") as file:
        file.write(b"GGUF of " + noted["merged_adapter_sha256"].encode())
    _write(Path(flags["--gguf"] + ".report.json"), noted)


def _write(path: Path, value: Any) -> None:
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(json.dumps(value))
    scratch.replace(path)


if __name__ == "__main__":
    main()
