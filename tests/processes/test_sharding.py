"""Processes that share the frozen weights of a model train as one that holds them all."""

import signal
from typing import Any

import pytest
from tests.processes.test_training import config, distance, ends_in_one_line, train
from tests.support.ranks import Ranks, signal_itself
from tests.support.shards import held_by_each
from tests.support.small_runs import write_data

from swlora.adapters.saved import read_facts
from swlora.config import ModelSpec
from swlora.metrics_file import read_metrics
from swlora.models.identity import weights_sample_sha256
from swlora.models.load import load_model
from swlora.progress import Silent
from swlora.recovery import recover

pytestmark = pytest.mark.slow

FAMILIES = {  # an odd number of layers, tokens and rows: parts are not of one size
    "gpt2": {},
    "llama": {"adapter.layers": "all"},
    "gemma2": {"model.memory_gb": 0.0023},  # its steps are run in smaller parts
}


@pytest.fixture
def settings(model_folder, tmp_path) -> Any:
    """A function kind -> the settings of 20 steps of 5 rows, by which trees are few or none."""

    def of(kind: str) -> dict[str, Any]:
        return {
            "model.name": str(model_folder(kind)),
            **{"model.device": "cpu", "model.dtype": "float32", "model.threads": 1},
            **{"adapter.layers": "last:2", "adapter.rank": 3, "train.learning_rate": 0.01},
            **{"train.batch_size": 5, "train.max_steps": 20, "train.epochs": 20},
            **{"train.save_every": "5steps", "train.eval_every_steps": 10},
            **write_data(tmp_path),
            **FAMILIES[kind],
        }

    return of


@pytest.mark.parametrize("kind", FAMILIES)
def test_sharded_weights_give_the_adapter_of_whole_ones(kind, settings, tmp_path):
    one = train(config(tmp_path, settings(kind)), tmp_path, 1, "one")
    two = train(config(tmp_path, settings(kind), train__shard=True), tmp_path, 2, "two")
    assert distance(one, two) < 1e-6
    for name in ("sum_nats", "n_tokens", "eval_nll"):
        ours, theirs = ([m[name] for m in read_metrics(run) if name in m] for run in (one, two))
        assert len(ours) in (2, 20) and ours == pytest.approx(theirs, rel=1e-5)
    said = (tmp_path / "log-0").read_text()
    assert "no prefix cache" in said or kind == "llama"
    assert ("with the same gradient" in said) == (kind == "gemma2")


@pytest.mark.parametrize(("kind", "dtype"), [("gpt2", "bfloat16"), ("gemma3_text", "float32")])
def test_a_process_holds_its_part_of_the_weights_alone(kind, dtype, model_folder, tmp_path):
    folder = model_folder(kind)
    parts = held_by_each(folder, tmp_path, dtype)
    whole = load_model(ModelSpec(name=str(folder), dtype=dtype, device="cpu")).model
    for part in parts:
        assert part["whole"] == []
        assert 0.45 < part["own_bytes"] / part["all_bytes"] < 0.55
        assert part["is_tied"] == (whole.lm_head.weight is whole.get_input_embeddings().weight)
        assert part["sample"] == weights_sample_sha256(whole)
        expected = dict(whole.named_parameters())
        assert part["sums"] == {n: float(p.double().sum()) for n, p in expected.items()}
        assert part["dtypes"] == {n: str(p.dtype) for n, p in expected.items()}
        assert part["buffers"] == {
            n: [str(b.dtype), b.double().tolist()] for n, b in whole.named_buffers()
        }
    assert sum(part["own_bytes"] for part in parts) == parts[0]["all_bytes"]


def test_a_single_process_goes_on_with_a_sharded_training(settings, tmp_path):
    whole = train(config(tmp_path, settings("gpt2")), tmp_path, 1, "whole")
    first = config(tmp_path, settings("gpt2"), train__shard=True)
    run, stopping = tmp_path / "run", {1: signal_itself(signal.SIGTERM, 7)}
    found = Ranks([*first, "--output", str(run)], tmp_path, 2, stopping).end()
    assert [code for code, _ in found] == [130, 130]
    recover(run, tmp_path / "rescued", Silent())
    assert read_facts(tmp_path / "rescued")["step"] in (7, 8)
    goes_on = ["train", "--resume", "--no-shard"]
    assert distance(whole, train(goes_on, tmp_path, 1, run.name)) < 1e-6


def test_what_cannot_be_sharded_is_refused_by_all_in_one_line(model_folder, settings, tmp_path):
    for kind, what in (("mixtral", "the experts of mixtral models"), ("falcon", "prefix trees")):
        of_kind = settings("gpt2") | {"model.name": str(model_folder(kind)), "train.shard": True}
        arguments = [*config(tmp_path, of_kind), "--output", str(tmp_path / kind)]
        ends_in_one_line(Ranks(arguments, tmp_path).end(), 2, what)
        assert not (tmp_path / kind).exists()


def test_a_killed_process_ends_the_others_with_its_name(settings, tmp_path):
    arguments = config(tmp_path, settings("llama"), train__shard=True)
    run, dying = tmp_path / "run", {1: signal_itself(signal.SIGKILL, 7)}
    ranks = Ranks([*arguments, "--output", str(run)], tmp_path, 2, dying)
    (code, said), (killed, _) = ranks.end(deadline_s=60.0)
    assert (code, killed) == (1, -signal.SIGKILL)
    lines = [line for line in said.splitlines() if line.startswith("swlora:")]
    assert len(lines) == 1 and "rank 1 on" in lines[0] and "is gone" in lines[0]
    whole = train(config(tmp_path, settings("llama")), tmp_path, 1, "whole")
    assert distance(whole, train(["train", "--resume"], tmp_path, 2, run.name)) < 1e-6
