"""The training loop: steps of whole sequences, AdamW, exact resume.

    gradient of a step = (sum over its trained tokens of the loss gradient) / (their number)
                         + gradient of the method's own term, where it has one

so that no result depends on how a step is padded or split; a token of weight w counts w times in
both. The step function is given: it adds the gradient of the summed loss and returns that loss.
Reported losses are without the method's own term.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from swlora.adapters.adapted import Adapted
from swlora.config import TrainSpec
from swlora.errors import DivergedError, RunFailedError
from swlora.loss_sum import LossSum
from swlora.plural import counted
from swlora.processes import StoppedTogether
from swlora.progress import Progress
from swlora.run_record import RunRecord
from swlora.threads import adapt_threads, adapted_threads, fix_threads, others_share
from swlora.training.callbacks import Callback, StepReport
from swlora.training.checkpoint import Checkpoints, LoopState, Totals
from swlora.training.device_update import decides_on_device, update_where_finite
from swlora.training.optimizer import make_optimizer
from swlora.training.pace import SHOWN_BUSY, Pace
from swlora.training.schedule import Schedule, Step
from swlora.training.stopping import StopRequest
from swlora.training.watch import HeldOutState, Watch


class StepFunction(Protocol):
    """Adds the gradient of a step's summed loss and returns that loss."""

    def __call__(self, groups: Step) -> LossSum:
        """Run forward and backward over the trees of one step."""


@adapted_threads()
def train(
    step_function: StepFunction,
    schedule: Schedule,
    adapted: Adapted,
    run: RunRecord,
    progress: Progress,
    watch: Watch | None = None,
    rows_of: Callable[[Step], str] = lambda _step: "",
    stop: StopRequest | None = None,
    callbacks: Sequence[Callback] = (),
) -> LoopState:
    """Train `adapted` for the steps of `schedule`, checkpointing into `run`; return the state.

    Continues from the run's checkpoint where there is one. SIGINT and SIGTERM end the loop after
    the current step with a checkpoint and KeyboardInterrupt. The last checkpoint is the final
    state; it goes when the run is done. `watch` measures held-out examples off the clock, keeps the
    best adapter and may end the training early; `rows_of` names the rows of a step that is skipped;
    `stop` is what a `DealtStep` agrees on with other processes, which all have the state that the
    first one loads; `callbacks` are told of every step, may end the training, and where one fails
    nothing is lost. Raises DivergedError before a non-finite loss or
    gradient could reach the weights, or weights that cannot be used a checkpoint.
    """
    spec = schedule.spec
    state = _begin(adapted, spec)
    folder, n_steps, stop = run.checkpoint, schedule.n_steps, stop or StopRequest()
    is_resumed = folder is not None and state.load(folder, progress.say)
    state.share()
    if is_resumed:
        progress.say(f"resuming after step {state.totals.step}")
    run.truncate_metrics(state.totals.step)
    if n_lost := state.totals.step - len(run.metrics()):
        progress.say(f"metrics.jsonl is damaged: the reports of {counted(n_lost, 'step')} are lost")
    if watch:
        watch.resume(state.held_out)
    checkpoints = Checkpoints(state, run, spec)
    weight = next(iter(adapted.model.parameters()))
    pace = Pace(step_function, weight, others_share())
    with progress.task("train", n_steps, state.totals.step) as task, stop.heard():
        for groups in _ahead(step_function, schedule.steps(state.totals.step)):
            if stop.ends or (watch and watch.is_over(state.held_out)):
                break
            random_state, before_s = state.random_state(), state.totals.elapsed_s
            pace.begin()
            try:  # the step alone: what fails after it finds weights that have changed
                report = _one_step(step_function, groups, state, schedule)
            except RunFailedError as error:
                if isinstance(error, DivergedError):
                    error.sequence_ids = np.concatenate(groups).tolist()
                if are_usable(adapted):  # raised before the weights changed: nothing is lost
                    state.set_random_state(random_state)
                    checkpoints.save()
                raise
            report |= pace.of_step(state.totals.elapsed_s - before_s)
            was_removed = _was_removed(run, progress, watch, state)
            if "skipped" in report:
                progress.say(_skipped(report, schedule, rows_of(groups)))
            if watch:
                report |= watch.after_step(state.held_out, state.totals.step, n_steps)
            run.append_metrics(report)
            task.advance(1, _note(report, state.held_out))
            if callbacks:
                _tell(callbacks, StepReport.of(report, n_steps, stop.end), state, checkpoints)
            stopping = stop.is_set  # asked once: the signal may come between two questions
            was_removed |= _was_removed(run, progress, watch, state)  # in a long measurement, say
            checkpoints.after_step(at_once=stopping or was_removed)
            if stopping:
                stopped = f"stopped after step {state.totals.step} of {n_steps}"
                how = f"; --resume --output {run.folder} continues" if folder else ""
                raise StoppedTogether(stopped + how)
    checkpoints.save()
    if state.totals.skipped == state.totals.step:
        raise DivergedError("no step of the training had a finite loss and gradient")
    return state


def _tell(
    callbacks: Sequence[Callback], report: StepReport, state: LoopState, checkpoints: Checkpoints
) -> None:
    """Call the callbacks; a checkpoint is written where one fails."""
    try:
        with state.same_random_numbers():
            for callback in callbacks:
                callback(report)
    except BaseException:
        checkpoints.save()
        raise


def _was_removed(run: RunRecord, progress: Progress, watch: Watch | None, state: LoopState) -> bool:
    """Say whether the run's folder was removed; it is made again, and without the best adapter."""
    if not run.keep_place():
        return False
    progress.say(
        f"{run.folder} was removed while the run was at work: it is made again, and goes on "
        "without the reports and the best adapter so far"
    )
    if watch:
        watch.lose_best(state.held_out)
    return True


def _skipped(report: dict[str, Any], schedule: Schedule, rows: str) -> str:
    n_most = schedule.spec_at(report["step"] - 1).skippable_steps
    return (
        f"step {report['step']} is skipped, {report['skipped']} of {n_most} at most: its loss or "
        "gradient is not finite" + (f" (rows of that step: {rows})" if rows else "")
    )


def reports(
    step_function: StepFunction, schedule: Schedule, adapted: Adapted
) -> Iterator[dict[str, Any]]:
    """Yield the report of every step of `schedule`, made as `train` makes it; nothing is written.

    Raises RunFailedError before a non-finite loss or gradient could reach the weights.
    """
    state = _begin(adapted, schedule.spec)
    for groups in schedule.steps():
        yield _one_step(step_function, groups, state, schedule)


def _ahead(step_function: StepFunction, steps: Iterator[Step]) -> Iterator[Step]:
    """Let a step function that can do so begin with the next step while it is at the last one."""
    ahead: Callable[[Iterator[Step]], Iterator[Step]] = getattr(step_function, "ahead", iter)
    return ahead(steps)


def _begin(adapted: Adapted, spec: TrainSpec) -> LoopState:
    if not adapted.parameters:
        raise RunFailedError("no parameter is trainable")
    if next(iter(adapted.parameters.values())).device.type == "cuda":
        fix_threads(torch.get_num_threads())  # the CPU computes next to nothing then
    return LoopState(adapted, make_optimizer(adapted, spec))


def _note(report: dict[str, Any], held_out: HeldOutState) -> str:
    loss = f"loss {report['loss']:.3f}" if "loss" in report else "skipped"
    parts = [loss, f"{report['examples_per_s']:.1f} examples/s"]
    if (share := report.get("peak_share")) is not None:
        parts.append(f"{share:.0%} of peak")
    if (busy := report.get("busy_share", 0.0)) >= SHOWN_BUSY:
        parts.append(f"other programs use {busy:.0%} of the cores")
    if held_out.last is not None and held_out.best is not None:
        parts.insert(1, f"held-out {held_out.last:.3f} (best {held_out.best:.3f})")
    return "  ".join(parts)


def _one_step(
    step_function: StepFunction, groups: Step, state: LoopState, schedule: Schedule
) -> dict[str, Any]:
    adapt_threads()
    start_s = time.perf_counter()
    totals, optimizer, adapted = state.totals, state.optimizer, state.adapted
    rate, spec = schedule.learning_rate(totals.step), schedule.spec_at(totals.step)
    for group in optimizer.param_groups:
        group |= {"lr": rate * group["factor"], "weight_decay": spec.weight_decay}
    loss = step_function(groups)
    parameters = adapted.parameters.values()
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1.0 / loss.n_tokens)
    penalty = adapted.penalty()
    if penalty is not None:
        torch.autograd.backward(penalty)
    norm_before = torch.nn.utils.clip_grad_norm_(parameters, spec.max_grad_norm)
    loss, norm = _update(state, loss, norm_before)
    is_finite = _are_finite(loss, norm)
    if not is_finite:
        if totals.skipped >= spec.skippable_steps:
            raise DivergedError(_not_finite(totals))
        totals.skipped += 1
    optimizer.zero_grad(set_to_none=True)
    step_s = time.perf_counter() - start_s
    totals.step += 1
    totals.rows += sum(map(len, groups))
    totals.tokens += loss.n_tokens
    totals.elapsed_s += step_s
    measured = {
        "loss": loss.nats_per_token,
        "sum_nats": loss.sum_nats,
        "n_tokens": loss.n_tokens,
        "grad_norm": norm,
    }
    return {
        "step": totals.step,
        **(measured if is_finite else {"skipped": totals.skipped}),
        "rows": totals.rows,
        "learning_rate": rate,
        "examples_per_s": totals.rows / totals.elapsed_s,
        "elapsed_s": totals.elapsed_s,
        "threads": torch.get_num_threads(),
    }


def _update(state: LoopState, loss: LossSum, norm: torch.Tensor) -> tuple[LossSum, float]:
    """Change the weights where loss and norm are finite, which are returned as numbers.

    DivergedError where the weights cannot be used then.
    """
    n_done, adapted = state.totals.step + 1, state.adapted
    if decides_on_device(adapted):
        loss, norm_value, is_usable = update_where_finite(
            state.optimizer, loss, norm, lambda: _usable(adapted)
        )
    else:
        norm_value, is_usable = float(norm), True
        if _are_finite(loss, norm_value):
            state.optimizer.step()
            adapted.after_step(n_done)
            is_usable = are_usable(adapted)
    if _are_finite(loss, norm_value) and not is_usable:
        raise DivergedError(
            f"step {n_done} made weights that are not finite, or too large to compute with: start "
            "again, or go on from the last checkpoint (--resume), with a lower --learning-rate"
        )
    return loss, norm_value


def _are_finite(loss: LossSum, norm: float) -> bool:
    return math.isfinite(loss.sum_nats) and math.isfinite(norm)


def _not_finite(totals: Totals) -> str:
    skipped = f", after {totals.skipped} that were skipped" if totals.skipped else ""
    more = "a larger N in --on-nonfinite skip:N" if skipped else "--on-nonfinite skip:N"
    return (
        f"the loss or its gradient is not finite at step {totals.step + 1}{skipped}; the weights "
        "are still those of the step before: start again, or go on from there (--resume), with a "
        f"lower --learning-rate or {more}"
    )


def are_usable(adapted: Adapted) -> bool:
    """Say whether the trained weights are finite, and their squares too.

    Beyond that a product of two of them is infinite in float32.
    """
    return bool(_usable(adapted))


def _usable(adapted: Adapted) -> torch.Tensor:
    weights = [p.detach() for p in adapted.parameters.values()]
    return torch.isfinite(torch.stack(torch._foreach_norm(weights))).all()
