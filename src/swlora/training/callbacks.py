"""What a training tells the callbacks of a person after each step, and what they can ask of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from swlora.errors import UserError


@dataclass(frozen=True)
class StepReport:
    """How a training stands after a step; losses are in nats a trained token.

    `step` counts from 1 to `n_steps`. `loss` is `sum_nats` over `n_tokens`, trained tokens by their
    weights; with `grad_norm` (before clipping) they are None for a step that was skipped, since it
    was not finite. `rows` were seen so far, in `elapsed_s` seconds of steps. `held_out_loss` is
    None where it was not measured after this step. `metrics` is the line of metrics.jsonl.
    """

    step: int
    n_steps: int
    loss: float | None
    sum_nats: float | None
    n_tokens: float | None
    grad_norm: float | None
    learning_rate: float
    rows: int
    elapsed_s: float
    examples_per_s: float
    held_out_loss: float | None
    metrics: Mapping[str, Any] = field(repr=False)
    stop: Callable[[], None] = field(repr=False, compare=False)
    """Ends the training after this step; with several processes, after the next one.

    The adapter is saved as it is then, and the run can go on later (`resume=True`, `--resume`).
    """

    @classmethod
    def of(cls, metrics: Mapping[str, Any], n_steps: int, stop: Callable[[], None]) -> "StepReport":
        """Return the report of a step whose line in metrics.jsonl is `metrics`."""
        return cls(
            step=metrics["step"],
            n_steps=n_steps,
            loss=metrics.get("loss"),
            sum_nats=metrics.get("sum_nats"),
            n_tokens=metrics.get("n_tokens"),
            grad_norm=metrics.get("grad_norm"),
            learning_rate=metrics["learning_rate"],
            rows=metrics["rows"],
            elapsed_s=metrics["elapsed_s"],
            examples_per_s=metrics["examples_per_s"],
            held_out_loss=metrics.get("eval_nll"),
            metrics=dict(metrics),
            stop=stop,
        )


Callback = Callable[[StepReport], object]  # what it returns does not matter


def as_callbacks(given: Callback | Sequence[Callback] | None) -> tuple[Callback, ...]:
    """Return one callback, several or none as a tuple; UserError for what cannot be called."""
    if given is None:
        return ()
    callbacks = tuple(given) if isinstance(given, Sequence) else (given,)
    for callback in callbacks:
        if not callable(callback):
            raise UserError(
                f"callbacks are functions of a step's report, not {type(callback).__name__}"
            )
    return callbacks
