"""What a person is shown when work is done: results as lines and small tables, on stdout."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from swlora.plural import counted

if TYPE_CHECKING:
    from swlora.evaluation.evaluated import Evaluated, Scored
    from swlora.recovery import Recovered
    from swlora.superweights.findings import Identified
    from swlora.training.pace import MeanPace
    from swlora.training.trained import Foreseen, Trained
    from swlora.training.watch import HeldOutLosses


def show_table(table: Sequence[Sequence[str]]) -> None:
    """Print rows of cells, their columns aligned."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def show_recovered(recovered: "Recovered") -> None:
    """Print what `recovery.recover` made."""
    print(
        f"recovered the adapter after step {recovered.step:,} of {recovered.n_steps:,} "
        f"({counted(recovered.n_rows, 'row')})"
    )
    print(f"adapter: {recovered.adapter} ({recovered.adapter_bytes / 1e6:.2f} MB)")


def show_candidates(result: "Identified") -> None:
    """Print what `pipeline.identify` found."""
    from swlora.superweights.report import COLUMNS, answer, rows

    print(f"perplexity of the intact model: {result.perplexity:.2f}")
    show_table([COLUMNS, *rows(result)])
    print("\n".join(answer(result)))
    print(f"report: {result.report}")
    print(f"figure: {result.figure}")


def show_training(trained: "Trained") -> None:
    """Print what `pipeline.train` did."""
    course = trained.course
    print(
        f"trained {counted(course.rows, 'row')} in {course.train_s:.0f} s, "
        f"{course.examples_per_s:.1f} examples/s"
    )
    if said := _pace(course.pace):
        print(said)
    n_steps, n_averaged = course.steps, course.final_loss_steps
    which = "last step" if n_averaged == 1 else f"mean of the last {n_averaged} of {n_steps} steps"
    print(f"loss: {course.final_loss:.3f} ({which})")
    if course.skipped_steps:
        print(f"skipped steps: {course.skipped_steps} (loss or gradient not finite)")
    if course.held_out is not None:
        _show_held_out(course.held_out, trained)
    if trained.foreseen is not None:
        _show_foreseen(trained.foreseen)
    print(f"adapter: {trained.adapter}")
    if trained.best_adapter is not None:
        print(f"best adapter: {trained.best_adapter}")


def _pace(pace: "MeanPace") -> str:
    """Say how fast the steps were, and what the machine had to do with it."""
    from swlora.training.pace import SHOWN_BUSY

    parts = []
    if pace.nodes_per_s is not None and pace.tokens_per_s is not None:
        parts.append(f"{pace.nodes_per_s:,.0f} nodes/s for {pace.tokens_per_s:,.0f} tokens/s")
    if pace.peak_share is not None:
        parts.append(f"{pace.peak_share:.0%} of what matrix products reach here")
    if pace.busy_share is not None and pace.busy_share >= SHOWN_BUSY:
        parts.append(f"other programs used {pace.busy_share:.0%} of the cores")
    return ", ".join(parts)


def _show_foreseen(foreseen: "Foreseen") -> None:
    memory, used_bytes = foreseen.peak_memory_bytes, foreseen.used_peak_memory_bytes
    said = []
    if memory is not None and used_bytes is not None:
        said.append(f"memory {memory / 1e9:.2f} GB foreseen, {used_bytes / 1e9:.2f} GB used")
    if foreseen.train_s is not None:
        said.append(f"time {foreseen.train_s:.0f} s foreseen, {foreseen.used_train_s:.0f} s used")
    if said:
        print("; ".join(said))


def _show_held_out(held_out: "HeldOutLosses", trained: "Trained") -> None:
    parts = (
        f"{held_out.first:.3f} first",
        f"{held_out.best:.3f} best (step {held_out.best_step})",
        f"{held_out.last:.3f} last",
    )
    print(f"held-out loss: {', '.join(parts)}")
    if trained.course.steps < trained.course.planned_steps:
        print(
            f"stopped early, after {trained.course.steps} of {trained.course.planned_steps} steps: "
            f"no better held-out loss in {counted(held_out.n_since_best, 'measurement')}"
        )
    elif held_out.last > 1.01 * held_out.best and trained.best_adapter is None:
        print("it was lowest before the end: --early-stopping 3 keeps that adapter too")


def show_evaluation(evaluated: "Evaluated") -> None:
    """Print the scores and losses of an evaluation."""
    from swlora.evaluation.report import evaluation_table

    print(evaluation_table(evaluated))
    if evaluated.predictions is not None:
        print(f"predictions: {evaluated.predictions}")


def show_scores(scored: "Scored") -> None:
    """Print the scores of existing outputs."""
    from swlora.evaluation.report import scores_table

    print(scores_table(scored.scores, scored.intervals, scored.n_prompts, texts=scored.text_scores))
    print(f"predictions: {scored.predictions}")
