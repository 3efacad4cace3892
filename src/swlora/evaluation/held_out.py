"""The loss on rows that are not trained on, measured while a training is under way."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swlora.adapters.adapted import Adapted
from swlora.adapters.methods import train_mode
from swlora.config import TrainSpec
from swlora.data.token_sequences import TokenSequences
from swlora.evaluation.dealt import dealt_losses
from swlora.evaluation.samples import Sampler
from swlora.models.sharded_weight import has_sharded
from swlora.processes import interruptible
from swlora.processes.joining import failing_together
from swlora.progress import Silent
from swlora.training.watch import Watch

# Where no numbers are given: how many measurements, and how many rows all of them together run
# (forward only) as a share of the training's rows. What only shows costs hundredths of its time.
N_SHOWN, SHARE_SHOWN = 5, 0.05
N_FOR_STOPPING, SHARE_FOR_STOPPING = 20, 0.2
LEAST_ROWS = 16


@dataclass(frozen=True)
class Measurements:
    """How often held-out rows are measured, and how many of them (None: all).

    `is_asked` says that somebody wants them; others are made where there are held-out rows.
    """

    every_steps: int
    n_rows: int | None
    is_asked: bool
    patience: int | None = None


def planned_measurements(spec: TrainSpec, *, n_steps: int, n_sequences: int) -> Measurements | None:
    """Return what `spec` asks for, or what is cheap in a training of `n_steps` over `n_sequences`.

    `n_sequences` counts a sequence once in every epoch. None where nothing shall be measured.
    """
    if spec.eval_every_steps == 0:
        return None
    if spec.eval_every_steps is not None:
        return Measurements(spec.eval_every_steps, spec.eval_rows, True, spec.early_stopping)
    n_measured, share = N_SHOWN, SHARE_SHOWN
    if spec.early_stopping is not None:
        n_measured, share = N_FOR_STOPPING, SHARE_FOR_STOPPING
    every_steps = -(-n_steps // n_measured)
    affordable = max(LEAST_ROWS, round(share * n_sequences / n_measured))
    is_asked = not (spec.early_stopping is spec.eval_rows is None)
    return Measurements(every_steps, spec.eval_rows or affordable, is_asked, spec.early_stopping)


def watch_of(
    adapted: Adapted,
    sequences: TokenSequences,
    planned: Measurements,
    save: Callable[..., Any],
    best_folder: Path | None,
    sampler: Sampler | None = None,
) -> Watch:
    """Return what the training loop measures on `sequences`; asked for, it keeps the best adapter
    in `best_folder`, unless that is None.

    `save(folder, losses_nats, step=...)` saves the model as it is; it is called while `adapted` is
    as it would be in the end. Several processes measure together, each a share of the sequences;
    where they share the model's weights, all measure the same. `sampler` generates beside it, and
    its seconds count with those of the loss.
    """
    observe_loss = held_out_observer(adapted.model, sequences)

    def observe(step: int) -> dict[str, Any]:
        found = observe_loss(step)
        if sampler is not None:
            start_s = time.perf_counter()
            sampler(adapted.model, step, -(-step // planned.every_steps))
            # Off the training's clock, as the loss is.
            found["eval_s"] += time.perf_counter() - start_s
        return found

    def measure(step: int) -> dict[str, Any]:
        with interruptible():
            if not has_sharded(adapted.model):
                return observe(step)
            with failing_together("the held-out loss of all processes"):
                return observe(step)

    def save_best(folder: Path, step: int, loss: float) -> None:
        with adapted.as_saved():
            save(folder, {f"held-out rows, after step {step}": loss}, step=step)

    return Watch(
        measure,
        planned.every_steps,
        planned.patience,
        best_folder if planned.is_asked else None,
        save_best if planned.is_asked else None,
    )


def held_out_observer(model: Any, sequences: TokenSequences) -> Callable[[int], dict[str, Any]]:
    """Return an observer for the training loop: the loss of a PeftModel on all `sequences`.

    The adapter's dropout is off while it measures and on again afterwards, so that the training
    goes on as it would have; no random number is drawn.
    """

    one_group = np.zeros(len(sequences), dtype=np.int64)

    def observe(_step: int) -> dict[str, Any]:
        start_s = time.perf_counter()
        model.eval()
        (loss,) = dealt_losses(model, sequences, one_group, Silent())
        train_mode(model)
        return {
            "eval_nll": loss.nats_per_token,
            "eval_sum_nats": loss.sum_nats,
            "eval_n_tokens": loss.n_tokens,
            "eval_s": time.perf_counter() - start_s,
        }

    return observe
