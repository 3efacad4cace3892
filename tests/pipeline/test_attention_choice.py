"""The kernels of attention that a run on a GPU began with are those with which it goes on."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.kernels.test_cuda_attention import as_on_cuda
from tests.support.adapters import attach
from tests.support.models import MakeModel

from swlora import attachment
from swlora.attachment import choose_attention
from swlora.config import AdapterSpec
from swlora.data.token_sequences import TokenSequences
from swlora.kernels import cuda_attention, tree_walk
from swlora.processes import World
from swlora.run_record import MemoryRecord
from swlora.training.step import TreeStep


def test_what_is_chosen_is_recorded_and_taken_again(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree_walk, "tree_attention", as_on_cuda)
    sequences = TokenSequences.from_lists([([1, 2, 3], [4, 5]), ([1, 2], [6])])
    said: list[str] = []
    peft_model = attach(make_model("llama"), AdapterSpec(rank=2, alpha=4), [0, 2], seed=1)
    step = TreeStep(peft_model, sequences, say=said.append)
    schedule: Any = SimpleNamespace(epoch=lambda _number: [[np.arange(2)]])
    job: Any = SimpleNamespace(run=MemoryRecord())
    choose_attention(job, schedule, step)
    (kind,) = job.run.facts["attention"]
    assert job.run.facts["attention"] == {kind: "dense"}
    assert len(said) == 1 and said[0].startswith(f"attention ({kind}, ")

    job.run.facts["attention"] = {kind: "chunks"}
    choose_attention(job, schedule, step)
    assert job.run.facts["attention"] == {kind: "chunks"} and len(said) == 1
    cuda_attention.prefer({})


@pytest.mark.parametrize(("is_sharded", "n_tried"), [(False, [1, 0]), (True, [1, 1])])
def test_processes_that_share_weights_try_together(
    is_sharded: bool, n_tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are gathered from all: a first process that tries alone would wait for ever."""
    schedule: Any = SimpleNamespace(epoch=lambda _number: [[np.arange(2)]])
    monkeypatch.setattr(attachment, "from_main", lambda _make: {"kind": "chunks"})
    for rank, n in enumerate(n_tried):
        monkeypatch.setattr(attachment, "world", lambda rank=rank: World(rank, 2))
        tried: list[Any] = []
        step: Any = SimpleNamespace(is_sharded=is_sharded, try_attention=tried.append)
        job: Any = SimpleNamespace(run=MemoryRecord())
        choose_attention(job, schedule, step)
        assert len(tried) == n
        assert job.run.facts["attention"] == {"kind": "chunks"}
    assert cuda_attention.chosen() == {"kind": "chunks"}  # in the second, as the first one says
    cuda_attention.prefer({})
