"""A run that goes on with another device or dtype than it began with, which `auto` may find."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support.whole_jobs import StopsIn, make_spec, run_in, work

from swlora.errors import UserError
from swlora.job import Job
from swlora.models import precision
from swlora.progress import Silent
from swlora.recovery import recover
from swlora.runs import Run, read_run

pytestmark = pytest.mark.usefixtures("no_drawings")
SAVED = {"train__checkpoint_every_s": 1e-9}


def go_on(folder: Path, forced: Any = None, **flags: Any) -> Any:
    changes = {name.replace("__", "."): value for name, value in flags.items()}
    run, spec = Run.reopen(folder, "train", changes, forced)
    with run:
        return work(Job(spec, run, Silent()))


def note(folder: Path, computes: str | None) -> None:
    """Write into run.json in what it computes; None: as older versions, which noted nothing."""
    facts = json.loads((folder / "run.json").read_text())
    noted = {} if computes is None else {"computes": computes}
    del facts["computes"]
    (folder / "run.json").write_text(json.dumps(facts | noted))


@pytest.fixture
def stopped(model_folder, rows, tmp_path) -> Path:
    """The folder of a training that was stopped after four steps."""
    with pytest.raises(KeyboardInterrupt):
        spec = make_spec(model_folder("llama"), rows, **SAVED)
        run_in(tmp_path / "stopped", spec, "train", progress=StopsIn("train", 6))
    return tmp_path / "stopped"


def test_another_device_is_named_and_let_through_where_asked(stopped):
    assert read_run(stopped)["computes"] == "cpu, float32"
    note(stopped, "cuda, bfloat16")
    named = "computes was cuda, bfloat16 and is now cpu, float32"
    with pytest.raises(UserError, match=f"cannot go on: {named}; .* add --force-resume") as refusal:
        go_on(stopped)
    assert "\n" not in str(refusal.value)
    said: list[str] = []
    assert go_on(stopped, forced=said.append)["steps"] == 12
    assert said == [f"goes on although {named}"]
    facts = read_run(stopped)
    assert facts["computes"] == "cpu, float32"
    assert facts["forced"] == [{"resumed": 2, "difference": named}]


def test_a_processor_on_which_auto_is_another_dtype_is_named(
    model_folder, rows, tmp_path, monkeypatch
):
    spec, folder = make_spec(model_folder("llama"), rows, model__dtype="auto"), tmp_path / "run"
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda _device: True)
    with pytest.raises(KeyboardInterrupt):
        run_in(folder, spec, "train", progress=StopsIn("train", 3))
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda _device: False)
    with pytest.raises(UserError, match=r"was cpu, bfloat16 and is now cpu, float32"):
        go_on(folder)
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda _device: True)
    assert go_on(folder)["steps"] == 12


def test_a_run_of_an_older_version_goes_on_and_notes_it(stopped):
    note(stopped, None)
    assert go_on(stopped)["steps"] == 12
    assert read_run(stopped)["computes"] == "cpu, float32"


def test_a_checkpoint_is_recovered_on_another_device(stopped, tmp_path):
    note(stopped, "cuda, bfloat16")
    assert recover(stopped, tmp_path / "rescued", Silent()).step == 4
    assert read_run(stopped)["computes"] == "cuda, bfloat16"


def test_a_run_that_is_done_stays_so_where_it_cannot_be_extended(model_folder, rows, tmp_path):
    folder = tmp_path / "run"
    run_in(folder, make_spec(model_folder("llama"), rows, **SAVED), "train")
    note(folder, "cuda, bfloat16")
    before = (folder / "run.json").read_bytes()
    with pytest.raises(UserError, match="is now cpu, float32"):
        go_on(folder, train__epochs=4)
    assert (folder / "run.json").read_bytes() == before
