"""The time of a training, foreseen from a few of its steps.

    seconds = first + a (nodes of all steps) + b (nodes of the states below) + a s (held-out nodes)

a and b are measured, seconds a node of a step and of the blocks below the lowest adapted one; first
is what the first step takes more, in which copies of weights and kernels are made. A held-out node
takes the share s of a, by the products that it needs: forward through all blocks and the head,
where a step needs forward and input gradient from the lowest adapted block on.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from swlora.adapters.adapted import Adapted
from swlora.adapters.methods import adapted_layers
from swlora.data.fixed_groups import fixed_groups
from swlora.data.prefix_tree import count_group_nodes, number_nodes
from swlora.data.token_sequences import Ints, TokenSequences
from swlora.models.anatomy import Anatomy
from swlora.threads import adapted_threads
from swlora.training.loop import reports
from swlora.training.plain import PlainStep
from swlora.training.schedule import Schedule, Step
from swlora.training.step import TreeStep

PROBE_S = 20.0
PROBE_SHARE = 0.05  # of the training, where that is less
LEAST_STEPS, MOST_STEPS = 2, 24  # of a probe, the first one left out
SPREAD = (5**0.5 - 1) / 2  # of an epoch between two steps of a probe: no two are near


@dataclass(frozen=True)
class Work:
    """What a training runs, in nodes of trees, or padded tokens where no trees are run.

    `by_step` (n,) are those of the first epoch's steps; later epochs are taken for the same.
    `held_out` are those of all measurements, `below` those of the blocks below the lowest adapted
    one, computed once where they are kept.
    """

    by_step: Ints
    n_steps: int
    below: int
    held_out: int

    @property
    def step_nodes(self) -> int:
        """The nodes of all steps."""
        return over_steps(self.by_step, self.n_steps)


@dataclass(frozen=True)
class Rates:
    """Seconds: what the first step takes more, and those of a node; `n_steps` were measured."""

    first_s: float
    step_s: float
    below_s: float
    held_out_share: float
    n_steps: int

    def seconds(self, work: Work) -> float:
        """Return the seconds of a training."""
        nodes = work.step_nodes + self.held_out_share * work.held_out
        return self.first_s + self.step_s * nodes + self.below_s * work.below


def over_steps(by_step: Ints, n_steps: int) -> int:
    """Return the sum over so many steps; `by_step` (n,) is the first epoch's, later ones alike."""
    n_epochs, n_more = divmod(n_steps, len(by_step))
    return int(n_epochs * by_step.sum() + by_step[:n_more].sum())


def nodes_by_step(step: TreeStep | PlainStep, steps: Sequence[Step]) -> Ints:
    """Return what each step runs, (n,): nodes of its trees, or tokens of its padded batches."""
    if isinstance(step, PlainStep):
        return np.array([step.padded_tokens(groups) for groups in steps])
    parts = [step.parts(groups) for groups in steps]
    nodes = count_group_nodes(step.sequences, [ids for own in parts for ids in own])
    starts = np.cumsum([0, *map(len, parts[:-1])])
    return np.add.reduceat(nodes, starts)


def nodes_below(step: TreeStep, schedule: Schedule, *, are_kept: bool) -> int:
    """Return the nodes for which the blocks below the lowest adapted one run, in a whole training.

    States that are kept are computed once, in fixed groups, whole ones where a step needs a part.
    """
    if step.walk.cut == 0:
        return 0
    steps = schedule.epoch(0)
    if not are_kept:
        return over_steps(nodes_by_step(step, steps), schedule.n_steps)
    groups = fixed_groups(step.sequences)
    nodes = np.diff(groups.first_node) + groups.n_shared
    if schedule.n_steps >= len(steps):
        return int(nodes.sum())
    numbers = number_nodes(step.sequences)
    owners = groups.owners(numbers[_contexts(step.sequences, steps[: schedule.n_steps])])
    return int(nodes[owners].sum())


def _contexts(sequences: TokenSequences, steps: Sequence[Step]) -> Ints:
    """Return the places of all tokens of the steps' sequences but the last of each."""
    ids = [i for groups in steps for own in groups for i in own.tolist()]
    return np.concatenate(
        [np.arange(sequences.offsets[i], sequences.offsets[i + 1] - 1) for i in ids]
    )


def largest_group_nodes(sequences: TokenSequences) -> int:
    """Return the nodes of the largest tree whose states are computed to be kept."""
    groups = fixed_groups(sequences)
    return int((np.diff(groups.first_node) + groups.n_shared).max())


def held_out_share(step: TreeStep | PlainStep) -> float:
    """Return s of the header: the products of a held-out node by those of a node of a step."""
    model = step.peft_model if isinstance(step, TreeStep) else step.model
    anatomy, cut = Anatomy(model.get_base_model()), adapted_layers(model)[0]
    blocks = [
        sum(p.numel() for p in block.parameters() if p.dim() > 1 and not p.requires_grad)
        for block in anatomy.blocks
    ]
    head = anatomy.head.get_parameter("weight").numel()
    return (sum(blocks) + head) / (2 * (sum(blocks[cut:]) + head))


class _Lap(NamedTuple):
    """A step that was run: its seconds without those of the blocks below, and what ran there."""

    step_s: float
    below_nodes: int
    below_s: float


class Stopwatch:
    """Tells what each step took, by the reports of the loop."""

    def __init__(self, step: TreeStep | PlainStep) -> None:
        self._walk = step.walk if isinstance(step, TreeStep) else None
        self.held_out_share = held_out_share(step)
        self._laps: list[_Lap] = []
        self._elapsed_s = 0.0
        self._below = self._below_so_far()

    @property
    def n_laps(self) -> int:
        """The number of steps so far."""
        return len(self._laps)

    def lap(self, elapsed_s: float) -> None:
        """Take in a step, after which all steps together took `elapsed_s`."""
        below = self._below_so_far()
        n_nodes, below_s = below[0] - self._below[0], below[1] - self._below[1]
        self._laps.append(_Lap(elapsed_s - self._elapsed_s - below_s, n_nodes, below_s))
        self._elapsed_s, self._below = elapsed_s, below

    def _below_so_far(self) -> tuple[int, float]:
        return (self._walk.n_below_nodes, self._walk.below_s) if self._walk else (0, 0.0)

    def rates(self, by_step: Ints) -> Rates:
        """Return the rates of the steps, whose nodes are `by_step`, over and over.

        The first step is slower, and counts where there are no others.
        """
        nodes = np.resize(by_step, len(self._laps))
        first, laps = self._laps[0], self._laps[1:] or self._laps
        step_s, n_below, below_s = (sum(column) for column in zip(*laps, strict=True))
        a = float(step_s / nodes[-len(laps) :].sum())
        b = below_s / n_below if n_below else 0.0
        usual_s = a * nodes[0] + b * first.below_nodes
        first_s = max(0.0, float(first.step_s + first.below_s - usual_s))
        return Rates(first_s, a, b, self.held_out_share, len(laps))


@adapted_threads()
def probe(step: TreeStep | PlainStep, schedule: Schedule, adapted: Adapted, work: Work) -> Rates:
    """Run a few real steps, spread over the first epoch, for PROBE_S at most; return the rates.

    Weights, what the method keeps and random generators have the same bits afterwards.
    """
    steps, start_s = schedule.epoch(0), time.perf_counter()
    order = [int(k * SPREAD * len(steps)) % len(steps) for k in range(1 + MOST_STEPS)]
    settings = schedule.spec.model_copy(update={"epochs": 1, "max_steps": None})
    trial = Schedule(settings, lambda _epoch: [steps[i] for i in order], len(order))
    watch, nodes = Stopwatch(step), work.by_step[order]
    with left_as_it_was(adapted):
        for report in reports(step, trial, adapted):
            watch.lap(report["elapsed_s"])
            gone_s, most_s = time.perf_counter() - start_s, PROBE_S
            if watch.n_laps > LEAST_STEPS:
                most_s = min(PROBE_S, PROBE_SHARE * watch.rates(nodes).seconds(work))
            if gone_s >= most_s:
                break
    return watch.rates(nodes)


@contextmanager
def left_as_it_was(adapted: Adapted) -> Iterator[None]:
    """Give trained weights, what the method keeps and random generators back after the body."""
    weights = [p.detach().clone() for p in adapted.parameters.values()]
    state = {name: tensor.clone() for name, tensor in adapted.state().items()}
    try:
        with torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(adapted.parameters.values(), weights, strict=True):
                parameter.copy_(before)
                parameter.grad = None
        adapted.load_state(state)
