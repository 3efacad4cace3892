"""The training loop: steps of whole data-set rows, AdamW, a schedule, exact resume.

    gradient of a step = (sum over its completion tokens of the loss gradient) / (their number)

so that no result depends on how a step is padded or split. The step function is given: it adds
the gradient of the summed loss and returns (sum_nats, n_tokens).
"""

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from swlora.config import TrainSpec
from swlora.data.tree_rows import TokenSequences, plan_steps
from swlora.engine.checkpoint import LoopState
from swlora.errors import RunFailedError
from swlora.progress import Progress
from swlora.runs import Run

Step = Sequence[np.ndarray]


class StepFunction(Protocol):
    """Adds the gradient of a step's summed loss and returns (sum_nats, n_tokens)."""

    def __call__(self, rows: Step) -> tuple[float, int]:
        """Run forward and backward over the rows of one step."""


class StepPlan(Protocol):
    """The steps of one epoch, a pure function of the epoch number."""

    def __call__(self, epoch: int) -> list[list[np.ndarray]]:
        """Return the steps; each is a list of rows, each row an array of sequence ids."""


def step_plan(sequences: TokenSequences, spec: TrainSpec, seed: int) -> StepPlan:
    """Return the plan that `spec` asks for: `plan_steps` as a function of the epoch."""

    def plan(epoch: int) -> list[list[np.ndarray]]:
        return plan_steps(
            sequences,
            sequences_per_step=spec.batch_size,
            max_tokens_per_row=spec.row_tokens,
            order=spec.order,
            seed=seed,
            epoch=epoch,
        )

    return plan


def learning_rate(spec: TrainSpec, step: int, n_steps: int) -> float:
    """Return the rate of step `step` (0-based): linear warm-up, then the schedule down to 0."""
    n_warmup = round(spec.warmup_fraction * n_steps)
    if step < n_warmup:
        return spec.learning_rate * (step + 1) / n_warmup
    if spec.schedule == "constant":
        return spec.learning_rate
    progress = (step - n_warmup) / max(1, n_steps - n_warmup)
    if spec.schedule == "linear":
        return spec.learning_rate * (1 - progress)
    return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    step_function: StepFunction,
    plan: StepPlan,
    parameters: dict[str, nn.Parameter],
    spec: TrainSpec,
    run: Run,
    progress: Progress,
) -> LoopState:
    """Train `parameters` for the epochs of `spec`, checkpointing into `run`; return the state.

    Continues from the run's checkpoint where there is one. SIGINT and SIGTERM end the loop after
    the current step with a checkpoint and KeyboardInterrupt. The last checkpoint is the final
    state; it goes when the run is done. Raises RunFailedError before a non-finite loss or gradient
    could reach the weights.
    """
    from accelerate import Accelerator

    if not parameters:
        raise RunFailedError("no parameter is trainable")
    device = next(iter(parameters.values())).device
    accelerator = Accelerator(mixed_precision="no", cpu=device.type == "cpu")
    if accelerator.num_processes > 1:
        raise RunFailedError("swlora trains in one process; start it without a launcher")
    optimizer = accelerator.prepare(_optimizer(parameters, spec))
    state = LoopState(parameters, optimizer.optimizer)
    folder = run.checkpoint
    if state.load(folder):
        progress.say(f"resuming after step {state.totals.step}")
    run.truncate_metrics(state.totals.step)
    epoch_lengths = [len(plan(epoch)) for epoch in range(spec.epochs)]
    n_steps = min(sum(epoch_lengths), spec.max_steps or sum(epoch_lengths))
    if n_steps == 0:
        raise RunFailedError("the training data holds no step; nothing was trained")
    saved_at_s = time.perf_counter()
    with progress.task("train", n_steps) as task, _stop_requested() as stop:
        task.advance(state.totals.step)
        for rows in _remaining(plan, epoch_lengths, state.totals.step, n_steps):
            try:
                report = _one_step(step_function, rows, state, accelerator, spec, n_steps)
            except RunFailedError:  # raised before the weights changed: nothing is lost
                state.save(folder)
                raise
            run.append_metrics(report)
            task.advance(1, f"loss {report['loss']:.3f}  {report['examples_per_s']:.1f} examples/s")
            stopping = stop.is_set()  # asked once: the signal may come between two questions
            if stopping or time.perf_counter() - saved_at_s > spec.checkpoint_every_s:
                state.save(folder)
                saved_at_s = time.perf_counter()
            if stopping:
                raise KeyboardInterrupt(
                    f"stopped after step {state.totals.step} of {n_steps}; "
                    f"--resume --output {run.folder} continues"
                )
    state.save(folder)
    return state


def _one_step(
    step_function: StepFunction,
    rows: Step,
    state: LoopState,
    accelerator: Any,
    spec: TrainSpec,
    n_steps: int,
) -> dict[str, Any]:
    start_s = time.perf_counter()
    totals, optimizer = state.totals, state.optimizer
    rate = learning_rate(spec, totals.step, n_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    sum_nats, n_tokens = step_function(rows)
    gradients = [p.grad for p in state.parameters.values() if p.grad is not None]
    torch._foreach_mul_(gradients, 1.0 / n_tokens)
    norm = float(accelerator.clip_grad_norm_(state.parameters.values(), spec.max_grad_norm))
    if not (math.isfinite(sum_nats) and math.isfinite(norm)):
        raise RunFailedError(
            f"the loss or its gradient is not finite at step {totals.step + 1}; the weights are "
            "still those of the step before: start again with a lower --learning-rate"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    step_s = time.perf_counter() - start_s
    n_rows = int(sum(len(row) for row in rows))
    totals.step += 1
    totals.rows += n_rows
    totals.tokens += n_tokens
    totals.elapsed_s += step_s
    return {
        "step": totals.step,
        "loss": sum_nats / n_tokens,
        "sum_nats": sum_nats,
        "n_tokens": n_tokens,
        "rows": totals.rows,
        "learning_rate": rate,
        "grad_norm": norm,
        "examples_per_s": totals.rows / totals.elapsed_s,
        "elapsed_s": totals.elapsed_s,
    }


def _optimizer(parameters: dict[str, nn.Parameter], spec: TrainSpec) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters.values(), lr=spec.learning_rate, weight_decay=spec.weight_decay, fused=True
    )


def _remaining(
    plan: StepPlan, epoch_lengths: list[int], n_done: int, n_steps: int
) -> Iterator[Step]:
    first = 0
    for epoch, length in enumerate(epoch_lengths):
        if first + length > n_done:
            steps = plan(epoch)
            yield from steps[max(0, n_done - first) : n_steps - first]
        first += length
        if first >= n_steps:
            return


@contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into a flag; the second one acts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous: dict[signal.Signals, Any] = {}

    def request(_number: int, _frame: Any) -> None:
        stop.set()
        for known, handler in previous.items():
            signal.signal(known, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
