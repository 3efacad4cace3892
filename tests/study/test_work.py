"""What a study's own processes do: find layers and time it, train and measure held-out loss."""

import json

import pytest
import yaml
from tests.support.data_files import write_rows

from swlora import pipeline
from swlora.errors import DivergedError, NoSuperWeightError, UserError
from swlora.loss_sum import LossSum
from swlora.runs import read_run
from swlora.study import work

ROWS = [{"prompt": f"prompt {k // 2}\n", "completion": f"answer {k} of many."} for k in range(60)]


@pytest.fixture
def start(model_folder, tmp_path):
    """A function (work, **sections) -> (run.json, result.json or {})."""
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    settings = {
        "model": {"name": str(model_folder("llama")), "dtype": "float32"},
        "data": {"name": str(rows), "eval_split": "dev"},
        "train": {"max_steps": 2, "batch_size": 4},
    }

    def run(kind, **sections):
        config, folder = tmp_path / "c.yaml", tmp_path / "run"
        config.write_text(yaml.safe_dump(settings | sections))
        work.main([kind, "--config", str(config), "--output", str(folder)])
        result = folder / "result.json"
        return read_run(folder), json.loads(result.read_text()) if result.exists() else {}

    return run


def test_a_short_run_keeps_its_loss_and_no_adapter(start, tmp_path):
    facts, result = start("train", adapter={"layers": "2"})
    assert (facts["status"], facts["command"]) == ("done", "train")
    held_out = result["heldout"]
    assert held_out["nll"] == pytest.approx(held_out["sum_nats"] / held_out["n_tokens"])
    # two rows of the last prompt, each byte a token, and the end
    assert held_out["n_tokens"] == sum(len(row["completion"]) + 1 for row in ROWS[-2:])
    assert (result["train"]["steps"], result["train"]["adapter"]) == (2, None)
    assert not (tmp_path / "run" / "adapter").exists()
    assert "loss" in facts["timings_s"]


@pytest.mark.parametrize("nats", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_divergence(nats, start, monkeypatch, tmp_path):
    monkeypatch.setattr("swlora.evaluation.loss.dataset_loss", lambda *_: LossSum(nats, 5))
    with pytest.raises(DivergedError, match="held-out rows is not finite after the training"):
        start("train", adapter={"layers": "2"})
    facts = read_run(tmp_path / "run")
    assert (facts["status"], facts["error"]["code"]) == ("failed", "diverged")


def test_layers_are_found_and_timed_without_loading(start, monkeypatch):
    seen = []

    def choose(job):
        seen.append(sorted(job.run.facts["timings_s"]))
        return [0, 2]

    monkeypatch.setattr(pipeline, "choose_layers", choose)
    facts, result = start("layers", adapter={"layers": "super"})
    assert result["choice"] == {"policy": "super", "layers": [0, 2], "reason": None}
    assert seen == [["load_data", "load_model"]]
    assert facts["timings_s"]["choose_layers"] < facts["timings_s"]["load_model"]


def test_that_there_is_no_super_weight_is_an_answer(start, monkeypatch):
    def choose(job):
        raise NoSuperWeightError("no super weight was verified")

    monkeypatch.setattr(pipeline, "choose_layers", choose)
    facts, result = start("layers", adapter={"layers": "super"})
    assert facts["status"] == "done"
    assert (result["choice"]["layers"], result["choice"]["reason"]) == (
        *([], "no super weight was verified"),
    )


def test_other_mistakes_are_failures(start, monkeypatch, tmp_path):
    def choose(_job):
        raise UserError("no room")

    monkeypatch.setattr(pipeline, "choose_layers", choose)
    with pytest.raises(UserError, match="no room"):
        start("layers", adapter={"layers": "super"})
    assert read_run(tmp_path / "run")["status"] == "failed"
