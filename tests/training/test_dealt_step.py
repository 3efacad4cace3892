"""A step dealt to processes, which are run here one after another: their sum is the whole step."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.adapters import attach, fill_b
from tests.support.gradients import measure
from tests.support.models import MakeModel
from tests.support.sequences import branching
from torch import Tensor

from swlora.adapters.adapted import Adapted
from swlora.adapters.methods import train_mode
from swlora.config import AdapterSpec
from swlora.data.token_sequences import TokenSequences
from swlora.loss_sum import LossSum
from swlora.processes.world import World
from swlora.training import dealt_step, stopping
from swlora.training.dealt_step import DealtStep
from swlora.training.plain import PlainStep
from swlora.training.schedule import Step
from swlora.training.step import TreeStep
from swlora.training.stopping import StopRequest

SPEC = AdapterSpec(targets=["all-linear"], rank=2, alpha=4)


class Processes:
    """N processes that do the same one after another; the last one has the sum of all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
        self.rank, self.n = 0, n
        self._so_far: list[Tensor] = []
        for module in (dealt_step, stopping):
            monkeypatch.setattr(module, "world", lambda: World(self.rank, self.n))
        monkeypatch.setattr(dealt_step, "summed", self.summed)

    def summed(self, tensors: Sequence[Tensor]) -> None:
        for tensor, before in zip(tensors, self._so_far, strict=bool(self._so_far)):
            tensor += before
        self._so_far = [tensor.clone() for tensor in tensors]

    def run(self, step: DealtStep, adapted: Adapted, groups: Step) -> LossSum:
        """Run a step in all processes; the gradients are those of the last one."""
        self._so_far = []
        for rank in range(self.n):
            self.rank = rank
            for parameter in adapted.parameters.values():
                parameter.grad = None
            loss = step(groups)
        return loss


@pytest.fixture
def sequences() -> TokenSequences:
    return TokenSequences.from_lists(branching())


@pytest.fixture
def adapted(make_model: MakeModel) -> Adapted:
    peft_model = attach(make_model("llama"), SPEC, [1, 2], seed=1)
    fill_b(peft_model)
    train_mode(peft_model)
    return Adapted(peft_model, SPEC)


@pytest.mark.parametrize("n", [1, 2, 3, 40])
@pytest.mark.parametrize("kind", [TreeStep, PlainStep])
def test_the_sum_of_all_processes_is_the_step_of_one(
    kind: Any, n: int, adapted: Adapted, sequences: TokenSequences, monkeypatch
) -> None:
    """Of 40 processes some have nothing to run."""
    groups = [np.arange(0, 9), np.arange(9, len(sequences))]
    whole = kind(adapted.model, sequences)
    sum_nats, n_tokens, gradients = measure(whole, adapted.parameters, groups)
    step = DealtStep(kind(adapted.model, sequences), adapted, StopRequest())
    loss = Processes(monkeypatch, n).run(step, adapted, groups)
    assert loss.n_tokens == n_tokens
    assert loss.sum_nats == pytest.approx(sum_nats, rel=1e-6)
    for name, gradient in gradients.items():
        ours = adapted.parameters[name].grad
        assert ours is not None
        assert float((ours - gradient).norm() / gradient.norm()) < 1e-5


def test_what_no_process_has_a_gradient_of_has_none(
    adapted: Adapted, sequences: TokenSequences, monkeypatch
) -> None:
    """AdamW decays weights whose gradient is zero, and leaves alone those that have none."""
    unused = torch.nn.Parameter(torch.ones(3))
    adapted.parameters["unused"] = unused
    step = DealtStep(TreeStep(adapted.model, sequences), adapted, StopRequest())
    Processes(monkeypatch, 40).run(step, adapted, [np.arange(5)])
    assert unused.grad is None
    assert all(p.grad is not None for p in adapted.parameters.values() if p is not unused)


def test_a_wish_to_stop_of_one_process_is_that_of_all(
    adapted: Adapted, sequences: TokenSequences, monkeypatch
) -> None:
    stop = StopRequest()
    step = DealtStep(TreeStep(adapted.model, sequences), adapted, stop)
    processes = Processes(monkeypatch, 2)
    processes.run(step, adapted, [np.arange(5)])
    assert not stop.is_set
    stop.is_asked = True  # before this process knows that all do
    assert not stop.is_set
    processes.run(step, adapted, [np.arange(5)])
    assert stop.is_set and not stop.ends
    stop.is_asked = False
    stop.end()
    assert not stop.ends
    processes.run(step, adapted, [np.arange(5)])
    assert stop.ends and not stop.is_set


def test_the_share_of_the_next_step_is_made_ahead(
    adapted: Adapted, sequences: TokenSequences, monkeypatch
) -> None:
    Processes(monkeypatch, 2)
    monkeypatch.setattr(dealt_step, "summed", lambda _tensors: None)
    inner = TreeStep(adapted.model, sequences)
    inner.works_ahead = True
    made: list[int] = []
    laid_out = inner._laid_out
    inner._laid_out = lambda of, ids: made.append(len(ids)) or laid_out(of, ids)  # type: ignore
    step = DealtStep(inner, adapted, StopRequest())
    steps = [[np.arange(0, 6)], [np.arange(6, 12)], [np.arange(12, 18)]]
    expected = [step(groups).sum_nats for groups in steps]
    n_made = list(made)
    made.clear()
    assert [step(groups).sum_nats for groups in step.ahead(iter(steps))] == expected
    assert sorted(made) == sorted(n_made)  # none was made twice


def test_every_process_draws_its_own_numbers_and_all_stand_at_the_same_place(monkeypatch) -> None:
    processes, drawn, after = Processes(monkeypatch, 3), [], []
    for rank in range(3):
        processes.rank = rank
        torch.manual_seed(4)
        for _ in range(2):
            with dealt_step._own_random_numbers(torch.device("cpu")):
                drawn.append(float(torch.rand(())))
        after.append(torch.get_rng_state())
    assert len(set(drawn)) == 6
    assert all(torch.equal(after[0], state) for state in after)
