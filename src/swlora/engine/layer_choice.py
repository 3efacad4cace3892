"""Layers by measurement: the ones from which up training is predicted to learn most a second.

A step runs backward through every block above the lowest adapted one, so adapters in all of these
cost little more, and the question is only where to begin. With f, c, h the seconds a data-set row
costs a frozen block, a trained block and the head, E epochs over cached prefixes with the layers
from l up (of n) take, a row,

    T(l) = l f + E ((n - l) c + h)

What Adam's first steps can win is their rate times the L1 norm of the gradient; G(l), the sum of
the norms from l up, is what a step is worth. Winning as much as one pass over the data with all
layers then takes the time of G(0) / G(l) passes, at least one; the least time is chosen.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from swlora.adapters.methods import adapt, train_mode
from swlora.config import RunSpec
from swlora.data.token_sequences import TokenSequences
from swlora.data.tree_rows import build_row
from swlora.engine.attention import TreeLayout
from swlora.engine.schedule import rows_per_step, step_plan
from swlora.engine.split_model import SplitModel
from swlora.engine.tree_step import TreeStep, fast_modules, row_loss
from swlora.errors import RunFailedError, UserError

MEASURED_ROWS = 256


@dataclass(frozen=True)
class LayerProfile:
    """What was measured: gradients' L1 norms by layer (nats a token and unit of rate), and the
    seconds a row costs the head, a frozen block and a trained block.
    """

    gradient_norms: list[float]
    head_s: float
    frozen_block_s: float
    trained_block_s: float

    def pass_s(self, lowest: int, *, is_first: bool) -> float:
        """Return the seconds a row of an epoch costs, with adapters from layer `lowest` up."""
        n_trained = len(self.gradient_norms) - lowest
        prefix_s = lowest * self.frozen_block_s if is_first else 0.0
        return prefix_s + n_trained * self.trained_block_s + self.head_s

    def training_s(self, lowest: int, n_epochs: float) -> float:
        """Return the seconds a row costs over `n_epochs` epochs, one at least."""
        later_s = self.pass_s(lowest, is_first=False)
        return self.pass_s(lowest, is_first=True) + max(0.0, n_epochs - 1) * later_s


@dataclass(frozen=True)
class Option:
    """The layers from `lowest` up: times a data-set row, and what they are predicted to bring.

    `share_of_time` is that of the asked epochs with all layers; `passes` over the data are needed
    to win what one pass with all layers wins, in `time_to_quality_s` a row.
    """

    lowest: int
    first_pass_s: float
    later_pass_s: float
    share_of_time: float
    share_of_gradient: float
    passes: float
    time_to_quality_s: float


@dataclass(frozen=True)
class Choice:
    """The option taken, and all that it was chosen from, lowest layer first."""

    layers: list[int]
    taken: Option
    options: list[Option]


def profile(
    model: Any, sequences: TokenSequences, spec: RunSpec, say: Callable[[str], None]
) -> LayerProfile:
    """Measure a base model on a few hundred rows, with the adapters of `spec` in all layers.

    The adapters are taken off again; the model's weights are those that it had.
    Raises UserError where the family cannot run tree rows or the adapters do not fit.
    """
    lora = spec.adapter.model_copy(update={"method": "lora"})
    n_layers = int(model.config.num_hidden_layers)
    adapted = adapt(model, lora, range(n_layers), seed=spec.seed)
    train_mode(adapted.model)
    try:
        step = TreeStep(adapted.model, sequences, say=say)
        if not step.split.anatomy.family.has_attention_interface:
            raise UserError("--layers auto needs tree rows, which this family cannot run")
        steps = step_plan(sequences, spec.train, spec.seed)(0)
        n_steps = max(2, MEASURED_ROWS // rows_per_step(spec.train, len(sequences)))
        return _profile(step, steps[:n_steps], adapted.parameters)
    finally:
        adapted.model.unload()


def choose(found: LayerProfile, *, n_epochs: int, budget: float) -> Choice:
    """Take the option with the least predicted time to quality whose share of time is in `budget`.

    Raises UserError where not even the last layer alone is.
    """
    norms = found.gradient_norms
    from_layer_up = list(accumulate(reversed(norms)))[::-1]
    if not from_layer_up[-1] > 0:
        raise RunFailedError("the adapters of the last layer have no gradient")
    all_s = found.training_s(0, n_epochs)
    options = []
    for lowest, gradient in enumerate(from_layer_up):
        passes = from_layer_up[0] / gradient
        options.append(
            Option(
                lowest=lowest,
                first_pass_s=found.pass_s(lowest, is_first=True),
                later_pass_s=found.pass_s(lowest, is_first=False),
                share_of_time=found.training_s(lowest, n_epochs) / all_s,
                share_of_gradient=gradient / from_layer_up[0],
                passes=passes,
                time_to_quality_s=found.training_s(lowest, passes),
            )
        )
    affordable = [option for option in options if option.share_of_time <= budget]
    if not affordable:
        least = min(option.share_of_time for option in options)
        raise UserError(
            f"--layers auto:{budget:g}: with {n_epochs} epochs even the last layer alone takes "
            f"{least:.2f} of the time of all layers; give a larger budget or more epochs"
        )
    taken = min(affordable, key=lambda option: option.time_to_quality_s)
    return Choice(list(range(taken.lowest, len(norms))), taken, options)


def table(choice: Choice) -> list[str]:
    """Lay out what a choice was made from, about ten lines of it, for a person."""
    options, taken = choice.options, choice.taken
    every = max(1, len(options) // 10)
    shown = [o for o in options if o.lowest % every == 0 or o is taken or o is options[-1]]
    lines = ["layers   ms a row: first, later epochs   of all layers' time, gradient   to quality"]
    lines += [
        f"{f'{o.lowest}-{options[-1].lowest}':<8} {o.first_pass_s * 1e3:16.2f} "
        f"{o.later_pass_s * 1e3:13.2f} {o.share_of_time:21.2f} {o.share_of_gradient:9.2f} "
        f"{o.time_to_quality_s * 1e3:11.2f} ms{'  <- taken' if o is taken else ''}"
        for o in shown
    ]
    return lines


def _profile(
    step: TreeStep, steps: Sequence[Sequence[np.ndarray]], parameters: dict[str, Any]
) -> LayerProfile:
    anatomy = step.split.anatomy
    blocks = {id(p): i for i, block in enumerate(anatomy.blocks) for p in block.parameters()}
    step(steps[0])  # memory and kernels warm up
    _clear(parameters)
    n_tokens = n_rows = 0
    start_s = time.perf_counter()
    for rows in steps:
        n_tokens += step(rows)[1]
        n_rows += sum(map(len, rows))
    whole_s = (time.perf_counter() - start_s) / n_rows
    norms = [0.0] * anatomy.n_layers
    for parameter in parameters.values():
        if parameter.grad is not None and id(parameter) in blocks:
            norms[blocks[id(parameter)]] += float(parameter.grad.abs().sum()) / n_tokens
    _clear(parameters)
    frozen_s, head_s = _partial_times_s(step, steps)
    n_layers = anatomy.n_layers
    trained_s = max(0.0, whole_s - head_s / n_rows) / n_layers
    return LayerProfile(norms, head_s / n_rows, frozen_s / n_rows / n_layers, trained_s)


def _partial_times_s(step: TreeStep, steps: Sequence[Sequence[np.ndarray]]) -> tuple[float, float]:
    """Return the seconds of all blocks without a graph, and those of the head with its gradient."""
    frozen_s = head_s = 0.0
    split: SplitModel = step.split
    with fast_modules(split.base_model):
        for ids in (ids for rows in steps for ids in step.parts(rows)):
            row = build_row(step.sequences, ids)
            layout = TreeLayout(row, step.base_model.device)
            start_s = time.perf_counter()
            with torch.no_grad():
                hidden = split.whole(layout)
            middle_s = time.perf_counter()
            row_loss(split, row, hidden.requires_grad_())
            head_s += time.perf_counter() - middle_s
            frozen_s += middle_s - start_s
    return frozen_s, head_s


def _clear(parameters: dict[str, Any]) -> None:
    for parameter in parameters.values():
        parameter.grad = None
