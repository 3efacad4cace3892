"""Stop and resume: the same adapter as if nothing had happened, of the same data."""

import peft
import pytest
from tests.support.data_files import write_rows
from tests.support.small_runs import ROWS
from tests.support.whole_jobs import StopsIn, make_spec, resume, run_in, same_adapters

from swlora.errors import RunFailedError, UserError
from swlora.runs import read_metrics, read_run

pytestmark = pytest.mark.usefixtures("no_drawings")


@pytest.mark.parametrize(
    ("engine", "task", "n", "n_steps"),
    [
        ("tree", "train", 2, 1),
        ("tree", "train", 6, 5),
        ("plain", "train", 6, 5),
        ("tree, pairs", "train", 6, 5),
        ("tree", "generate", 1, 12),
    ],
)
def test_a_resumed_run_gives_the_same_adapter(
    task, n, n_steps, engine, model_folder, rows, tmp_path
):
    """Stopped before the first checkpoint, in training, or after it; with dropout, which is random.

    (The first advance of the bar is one of no steps.)
    """
    changes = {"adapter__dropout": 0.3, "train__checkpoint_every_s": 1e-9}
    engine, _, order = engine.partition(", ")
    changes |= {"train__engine": engine, "train__order": order or "prompts"}
    spec = make_spec(model_folder("llama"), rows, **changes)
    expected = run_in(tmp_path / "whole", spec)
    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run_in(folder, spec, progress=StopsIn(task, n))
    assert read_run(folder)["status"] == "cancelled"
    assert len(read_metrics(folder)) == n_steps
    result = resume(folder)
    assert same_adapters(tmp_path / "whole", folder)
    assert result["eval"]["nll"] == expected["eval"]["nll"]
    for key in ("rows", "steps", "last_loss", "n_trainable"):
        assert result["train"][key] == expected["train"][key]
    facts = read_run(folder)
    assert (facts["status"], facts["resumed"]) == ("done", 1)
    assert not (folder / "checkpoint").exists()
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, 13))


def test_a_run_does_not_go_on_with_other_data(model_folder, rows, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_in(folder, make_spec(model_folder("llama"), rows), progress=StopsIn("train", 3))
    write_rows(rows[0], [*ROWS[1:], ROWS[0]])
    with pytest.raises(UserError, match="cannot go on: data_sha256 was"):
        resume(folder)
    write_rows(rows[0], ROWS)
    assert resume(folder)["train"]["steps"] == 12


def test_a_full_disk_when_the_adapter_is_saved_costs_no_training(
    model_folder, rows, tmp_path, monkeypatch
):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(RunFailedError, match="No space left"):
        patch.setattr(peft.PeftModel, "save_pretrained", full)
        run_in(folder, make_spec(model_folder("llama"), rows))
    monkeypatch.setattr("swlora.training.loop._one_step", full)  # must not be needed again
    assert resume(folder)["train"]["steps"] == 12
