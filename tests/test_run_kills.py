"""What a kill leaves of a run folder, and what the next process makes of it."""

from pathlib import Path

import pytest
import torch

from swlora.config import AdapterSpec, RunSpec, load_spec
from swlora.errors import UserError
from swlora.runs import Run, read_run
from swlora.snapshots import Snapshot, has_snapshot, save_snapshot

SNAPSHOT = Snapshot(1, {"x": torch.ones(2)}, {})


def start(folder: Path) -> Run:
    return Run.create(folder, RunSpec(), "train")


def ended(folder: Path, error: BaseException) -> None:
    """Leave a run that an error ended."""
    with pytest.raises(type(error)), start(folder):
        raise error


def test_a_kill_before_a_run_has_its_settings_leaves_the_folder_free(tmp_path):
    start(tmp_path)
    (tmp_path / "config.yaml").unlink()
    (tmp_path / ".config.yaml-12345678.partial").write_text("half")
    with pytest.raises(UserError, match="was stopped before it began; start it again"):
        Run.reopen(tmp_path, "train")
    with start(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "run.json"}


def test_settings_of_a_run_that_came_to_nothing_are_not_those_of_the_next(tmp_path, monkeypatch):
    """Killed before its own are written, it has none; the older ones would be taken for its own."""
    ended(tmp_path, UserError("no"))

    def killed(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("swlora.runs.dump_yaml", killed)
        Run.create(tmp_path, RunSpec(seed=9), "train")
    assert not (tmp_path / "config.yaml").exists()
    with pytest.raises(UserError, match="was stopped before it began"):
        Run.reopen(tmp_path, "train")
    Run.create(tmp_path, RunSpec(seed=9), "train")
    assert load_spec(tmp_path / "config.yaml", {}).seed == 9


def test_what_a_kill_left_half_written_goes_when_the_run_is_reopened(tmp_path):
    ended(tmp_path, KeyboardInterrupt())
    save_snapshot(tmp_path / "checkpoint", SNAPSHOT)
    kept = {path for path in tmp_path.rglob("*") if path.is_file()}
    for name in (".run.json-abcdefgh.partial", "checkpoint/.state-2.json-abcdefgh.partial"):
        (tmp_path / name).write_text("{")
    for name in (".adapter.partial", ".best-previous"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "swlora.json").write_text("{}")
    (tmp_path / ".mine").write_text("")
    Run.reopen(tmp_path, "train")
    put_back = tmp_path / "best" / "swlora.json"
    now = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert now == kept | {put_back, tmp_path / ".mine"}


def test_the_disk_says_done_before_the_checkpoint_goes(tmp_path, monkeypatch):
    """As it does after `full`, whose checkpoints are too large to keep for more epochs."""
    run = Run.create(tmp_path, RunSpec(adapter=AdapterSpec(method="full")), "train")
    save_snapshot(run.checkpoint, SNAPSHOT)

    def killed(*_: object, **__: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("shutil.rmtree", killed)
        with run:
            pass
    assert read_run(tmp_path)["status"] == "done" and has_snapshot(run.checkpoint)
    with pytest.raises(UserError, match="is done; there is nothing to resume"):
        Run.reopen(tmp_path, "train")
    assert not run.checkpoint.exists()
