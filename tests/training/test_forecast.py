"""The time of a training is foreseen by what it runs, and by steps that leave no trace."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.adapters import adapter_spec
from tests.support.models import MakeModel
from tests.support.prefix_runs import adapted as adapted_model
from tests.support.prefix_runs import make_sequences

from swlora.adapters.methods import adapt, train_mode
from swlora.config import TrainSpec
from swlora.kernels.tree_layout import TreeLayout
from swlora.time_foreseen import work_of
from swlora.training.forecast import (
    Rates,
    Stopwatch,
    Work,
    left_as_it_was,
    nodes_below,
    nodes_by_step,
    probe,
)
from swlora.training.kept_states import kept_by, kept_states
from swlora.training.loop import reports
from swlora.training.plain import PlainStep
from swlora.training.schedule import Schedule
from swlora.training.step import TreeStep, make_step

SPEC = TrainSpec(batch_size=6, row_tokens=64, epochs=1)


def counted(step: TreeStep, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that says how many nodes the step has run from now on."""
    run, nodes = TreeStep._nats, list[int]()

    def noted(self: TreeStep, tree: Any, layout: TreeLayout) -> Any:
        nodes.append(layout.n_nodes)
        return run(self, tree, layout)

    monkeypatch.setattr(TreeStep, "_nats", noted)
    return lambda: sum(nodes)


@pytest.mark.parametrize("most_nodes", [None, 25])
def test_nodes_are_those_that_steps_run(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, most_nodes: int | None
) -> None:
    sequences = make_sequences()
    step = TreeStep(adapted_model(make_model), sequences)
    step.most_nodes = most_nodes
    schedule = Schedule.of(sequences, SPEC, 0)
    foreseen, run = nodes_by_step(step, schedule.epoch(0)), counted(step, monkeypatch)
    for number, groups in enumerate(schedule.epoch(0)):
        step(groups)
        assert run() == foreseen[: number + 1].sum()


def test_padded_tokens_are_those_of_the_batches(make_model: MakeModel) -> None:
    sequences = make_sequences()
    step = PlainStep(adapted_model(make_model), sequences)
    schedule = Schedule.of(sequences, SPEC, 0)
    for groups, found in zip(
        schedule.epoch(0), nodes_by_step(step, schedule.epoch(0)), strict=True
    ):
        lengths = sequences.lengths[np.concatenate(groups)]
        assert found == len(lengths) * lengths.max()


@pytest.mark.usefixtures("fresh_cache", "small_fixed_groups")
@pytest.mark.parametrize("max_steps", [None, 1])
@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_the_states_below_are_those_that_are_computed(
    make_model: MakeModel, cache_gb: float, max_steps: int | None
) -> None:
    sequences, said = make_sequences(), list[str]()
    spec = SPEC.model_copy(update={"cache_gb": cache_gb, "max_steps": max_steps})
    schedule = Schedule.of(sequences, spec, 0)
    step = make_step(adapted_model(make_model), sequences, spec, said.append)
    assert isinstance(step, TreeStep)
    before = kept_by(step)
    assert before.are_kept == (cache_gb > 0) and before.missing_share == 1
    foreseen = nodes_below(step, schedule, are_kept=before.are_kept)
    for groups in schedule.steps():
        step(groups)
    assert step.walk.n_below_nodes == foreseen > 0
    assert step.walk.below_s > 0
    step.close()
    # What a step that was not made to keep states says is the same.
    fresh = TreeStep(adapted_model(make_model), sequences)
    later = kept_states(fresh, spec, 0, said.append)
    assert later.n_bytes == before.n_bytes
    assert (later.missing_bytes < before.missing_bytes) == (cache_gb > 0)


class Played(Stopwatch):
    """A stopwatch over a step whose blocks below run when the test says so."""

    played = (0, 0.0)

    def play(self, step_s: float, below_nodes: int, below_s: float) -> None:
        self.played = (self.played[0] + below_nodes, self.played[1] + below_s)
        self.lap(self._elapsed_s + step_s + below_s)

    def _below_so_far(self) -> tuple[int, float]:
        return self.played


def test_rates_are_those_of_all_steps_but_the_first(make_model: MakeModel) -> None:
    sequences = make_sequences()
    watch = Played(TreeStep(adapted_model(make_model), sequences))
    nodes = np.array([100, 200, 50, 150])
    for number, n in enumerate(nodes.tolist()):
        watch.play(0.01 * n + (3.0 if number == 0 else 0.0), 2 * n, 0.004 * n)
    rates = watch.rates(nodes)
    assert rates.step_s == pytest.approx(0.01)
    assert rates.below_s == pytest.approx(0.002)
    assert rates.first_s == pytest.approx(3.0)
    assert rates.n_steps == 3
    work = Work(nodes, n_steps=10, below=1000, held_out=40)
    assert work.step_nodes == 2 * 500 + 300
    expected = 3 + 0.01 * (1300 + rates.held_out_share * 40) + 0.002 * 1000
    assert rates.seconds(work) == pytest.approx(expected)


def test_a_held_out_node_takes_half_of_a_step_over_all_layers(make_model: MakeModel) -> None:
    def share(layers: list[int]) -> float:
        model = adapt(make_model("llama"), adapter_spec("lora"), layers, seed=1).model
        return Stopwatch(TreeStep(model, make_sequences())).held_out_share

    assert share([0, 1, 2]) == pytest.approx(0.5)
    bare = make_model("llama")
    block = sum(p.numel() for p in bare.model.layers[0].parameters() if p.dim() > 1)
    head = bare.lm_head.weight.numel()
    assert share([2]) == pytest.approx((3 * block + head) / (2 * (block + head)))


def test_work_has_the_held_out_nodes_of_every_measurement() -> None:
    """After steps 4 and 8, and after the last one."""

    class Counted(PlainStep):
        def __init__(self) -> None:
            """Take no model."""

        def padded_tokens(self, groups: Any) -> int:
            return sum(groups)

    prepared: Any = SimpleNamespace(
        schedule=SimpleNamespace(n_steps=11, epoch=lambda _: [[3], [4]]),
        measurements=SimpleNamespace(every_steps=4),
        held_out_nodes=np.array([5, 6]),
    )
    kept: Any = SimpleNamespace()
    work = work_of(prepared, Counted(), kept)
    assert (work.held_out, work.below, work.n_steps) == (3 * (5 + 6), 0, 11)
    prepared.measurements = None
    assert work_of(prepared, Counted(), kept).held_out == 0


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "full"])
def test_a_probe_leaves_no_trace(make_model: MakeModel, method: str) -> None:
    """Weights, generators and what a method keeps; and the training behind it has the same bits."""
    sequences = make_sequences()
    schedule = Schedule.of(sequences, SPEC.model_copy(update={"epochs": 4}), 0)

    def losses(*, is_probed: bool) -> list[float]:
        spec = adapter_spec(method, **({} if method == "full" else {"dropout": 0.3}))
        model = make_model("llama")
        adapted = adapt(model, spec, [1, 2], seed=1, n_steps=schedule.n_steps)
        train_mode(adapted.model)
        step = TreeStep(adapted.model, sequences)
        torch.manual_seed(3)
        if is_probed:
            before = {name: t.clone() for name, t in adapted.model.state_dict().items()}
            generator = torch.get_rng_state()
            work = Work(nodes_by_step(step, schedule.epoch(0)), schedule.n_steps, 0, 0)
            rates = probe(step, schedule, adapted, work)
            assert isinstance(rates, Rates) and rates.step_s > 0 and rates.n_steps >= 2
            assert torch.equal(torch.get_rng_state(), generator)
            for name, tensor in adapted.model.state_dict().items():
                assert torch.equal(tensor, before[name]), name
            assert all(p.grad is None for p in adapted.parameters.values())
            assert not adapted.state()
        return [report["loss"] for report in reports(step, schedule, adapted)]

    assert losses(is_probed=True) == losses(is_probed=False)


def test_what_fails_in_between_leaves_no_trace_either(make_model: MakeModel) -> None:
    adapted = adapt(make_model("llama"), adapter_spec("lora"), [1], seed=1)
    before = [p.detach().clone() for p in adapted.parameters.values()]
    with pytest.raises(KeyboardInterrupt), left_as_it_was(adapted):
        for parameter in adapted.parameters.values():
            parameter.data += 1
        raise KeyboardInterrupt
    for parameter, expected in zip(adapted.parameters.values(), before, strict=True):
        assert torch.equal(parameter, expected)
