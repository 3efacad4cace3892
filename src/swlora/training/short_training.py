"""A short training from a base model's weights, to compare choices by; it leaves no trace.

Every one with the same seed begins with the same weights, examples and random numbers.
"""

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from swlora.adapters.methods import train_mode
from swlora.config import RunSpec
from swlora.data.prefix_tree import build_tree
from swlora.data.token_sequences import TokenSequences
from swlora.errors import DivergedError
from swlora.kernels.forwards import fast_forwards
from swlora.kernels.patched_forwards import patched_forwards
from swlora.kernels.tree_layout import TreeLayout
from swlora.loss_sum import LossSum
from swlora.random_numbers import drawing_by
from swlora.training.fitting import fit_trial
from swlora.training.layer_profile import temporary_adapters
from swlora.training.loop import reports
from swlora.training.schedule import Schedule, Step
from swlora.training.step import TreeStep, tree_nats

HELD_OUT_EXAMPLES, HELD_OUT_SHARE = 64, 0.25  # of an epoch; at most

Steps = list[list[np.ndarray]]


def without_held_out(steps: Steps, n_sequences: int) -> tuple[Steps, Steps]:
    """Divide the steps of an epoch into (those held out, none where they are few; the others)."""
    per_step = math.ceil(n_sequences / len(steps))
    n = min(math.ceil(HELD_OUT_EXAMPLES / per_step), int(HELD_OUT_SHARE * len(steps)))
    return steps[:n], steps[n:]


def train_shortly(
    model: Any,
    sequences: TokenSequences,
    spec: RunSpec,
    layers: Sequence[int],
    schedule: Schedule,
    held_out: Sequence[Step],
    measured_at: Collection[int],
    advance: Callable[[], None],
) -> dict[int, float | None]:
    """Train fresh adapters in `layers` by a schedule; take them off again.

    Returns the held-out loss in nats a token after the steps `measured_at`, of which 0 is before
    the first; None where the training broke off because its loss or gradient was not finite.
    """
    losses: dict[int, float | None] = {}
    with (
        temporary_adapters(model, spec.adapter, layers, spec.seed) as adapted,
        drawing_by(spec.seed, device := model.device),
    ):
        step = TreeStep(
            adapted.model, sequences, label_smoothing=spec.train.label_smoothing, say=_say_nothing
        )
        fit_trial(step, schedule, _say_nothing)
        try:
            with drawing_by(spec.seed, device):  # dropout, whatever was drawn until here
                if 0 in measured_at:
                    losses[0] = _held_out_loss(step, held_out)
                for report in reports(step, schedule, adapted):
                    advance()
                    if report["step"] in measured_at:
                        losses[report["step"]] = finite_or_none(_held_out_loss(step, held_out))
        except DivergedError:
            losses |= {n: None for n in measured_at if n not in losses}
    return losses


@torch.no_grad()
def _held_out_loss(step: TreeStep, steps: Sequence[Step]) -> float:
    """Return the loss in nats a token, without dropout and label smoothing."""
    total = LossSum()
    step.peft_model.eval()
    with patched_forwards(fast_forwards(step.peft_model)):
        for groups in steps:
            total += step.fitted(groups, partial(_loss_of, step, groups))
    train_mode(step.peft_model)
    return total.nats_per_token


def _loss_of(step: TreeStep, groups: Step) -> LossSum:
    total = LossSum()
    for ids in step.parts(groups):
        tree = build_tree(step.sequences, ids)
        hidden = step.walk.whole(TreeLayout(tree, step.base_model.device))
        total += LossSum(float(tree_nats(step.walk, tree, hidden)), tree.n_target_tokens)
    return total


def finite_or_none(loss: float) -> float | None:
    """Return a loss, None for that of a training that diverged."""
    return loss if math.isfinite(loss) else None


def loss_or_infinity(loss: float | None) -> float:
    """Return a loss to compare, infinitely high for that of a training that diverged."""
    return math.inf if loss is None else loss


def loss_text(loss: float | None) -> str:
    """Write a loss for a person."""
    return "diverged" if loss is None else f"{loss:.3f}"


def _say_nothing(_line: str) -> None:
    """Drop a line: the training that follows says the same."""
