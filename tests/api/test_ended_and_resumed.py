"""Trainings in Python that a callback ends, and that go on later."""

import os
from pathlib import Path

import pytest
from tests.support.api_calls import TRAINING
from tests.support.small_runs import Heard, same_weights, weights

import swlora
from swlora.cli import main
from swlora.errors import UserError
from swlora.runs import read_run
from swlora.training.callbacks import StepReport


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_callback_ends_a_training_that_goes_on_later(method, settings) -> None:
    """With its adapter, `full` too, whose checkpoints a training that is done does not keep."""
    settings |= TRAINING | {"eval_every_steps": 4, "method": method}
    if method == "full":
        del settings["rank"]
    whole = swlora.train(**settings, output="../whole")
    held_out: dict[int, float] = {}

    def enough(report: StepReport) -> None:
        if report.held_out_loss is not None:
            held_out[report.step] = report.held_out_loss
        if report.step == 5:
            report.stop()

    heard = Heard()
    ended = swlora.train(**settings, output="../ended", callbacks=enough, progress=heard)
    assert (ended.course.steps, ended.course.planned_steps) == (5, 8)
    assert ended.course.held_out.last == held_out.pop(4) and not held_out
    assert "a callback ended the training after step 5 of 8" in heard.lines
    facts = read_run(Path("../ended"))
    assert (facts["status"], facts["stopped_after_step"]) == ("done", 5)
    assert weights(ended.adapter).keys() == weights(whole.adapter).keys()
    with pytest.raises(UserError, match=r"already holds a run \(done\).* or continue it with"):
        swlora.train(**settings, output="../ended")
    main(["train", "--output", "../ended", "--resume"])
    assert same_weights(ended.adapter, whole.adapter)
    facts = read_run(Path("../ended"))
    assert facts["status"] == "done" and "stopped_after_step" not in facts
    assert Path("../ended/checkpoint").exists() is (method == "lora")
    with pytest.raises(SystemExit):
        main(["train", "--output", "../ended", "--resume"])


def test_a_training_that_is_ended_without_a_run_folder(settings) -> None:
    trained = swlora.train(**settings, **TRAINING, callbacks=[lambda report: report.stop()])
    assert trained.course.steps == 1 and os.listdir() == []
    with pytest.raises(UserError, match="callbacks are functions"):
        swlora.train(callbacks="wandb")


def test_a_run_goes_on_as_with_the_flag(settings) -> None:
    """In steps that change it, and not where that is said in two ways, or of no run."""
    settings |= TRAINING
    whole = swlora.train(**settings, output="../whole")

    def interrupt(report: StepReport) -> None:
        if report.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        swlora.train(**settings, output="../run", callbacks=interrupt)
    seen: list[int] = []
    trained = swlora.train(
        output="../run", resume=True, callbacks=lambda report: seen.append(report.step)
    )
    assert seen == [4, 5, 6, 7, 8]
    assert same_weights(trained.adapter, whole.adapter)
    longer = swlora.train(output="../run", resume=True, epochs=3)
    assert longer.course.steps == 12
    with pytest.raises(UserError, match="nothing to resume"):
        swlora.train(output="../run", resume=True)
    with pytest.raises(UserError, match="resume=True needs the run's folder: output="):
        swlora.train(resume=True)
    with pytest.raises(UserError, match="verify=True is for a run that can go on"):
        swlora.train(verify=True)
    with pytest.raises(UserError, match="leave out config"):
        swlora.train(output="../run", resume=True, config="c.yaml")
    with pytest.raises(UserError, match="keeps its --rank"):
        swlora.train(output="../run", resume=True, rank=5, epochs=4)


def test_a_flag_without_effect_leaves_the_run_to_be_resumed(settings) -> None:
    swlora.train(**settings, **TRAINING, output="../run", callbacks=lambda report: report.stop())
    with pytest.raises(UserError, match="nothing is generated without --sample-prompts"):
        swlora.train(output="../run", resume=True, sample_every=2)
    assert swlora.train(output="../run", resume=True).course.steps == 8


def test_resume_is_forced_where_the_run_is_not_what_it_was(settings) -> None:
    swlora.train(**settings, **TRAINING, output="../run", callbacks=lambda report: report.stop())
    rows = Path(settings["dataset"])
    rows.write_text(rows.read_text().replace("serves", "sells"))
    with pytest.raises(UserError, match="data_sha256"):
        swlora.train(output="../run", resume=True)
    heard = Heard()
    swlora.train(output="../run", force_resume=True, progress=heard)
    assert any(line.startswith("goes on although data_sha256") for line in heard.lines)
