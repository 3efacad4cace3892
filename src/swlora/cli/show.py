"""What a person is shown when work is done: results as lines and small tables, on stdout."""

from typing import Any


def show_candidates(result: dict[str, Any]) -> None:
    """Print what `pipeline.identify` found."""
    from swlora.superweights.report import COLUMNS, answer, rows

    print(f"perplexity of the intact model: {result['perplexity']:.2f}")
    table = [COLUMNS, *rows(result)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    print("\n".join(answer(result)))
    print(f"report: {result['report']}")
    print(f"figure: {result['figure']}")


def show_training(result: dict[str, Any]) -> None:
    """Print what `pipeline.train` did."""
    print(
        f"trained {result['rows']} rows in {result['train_s']:.0f} s, "
        f"{result['examples_per_s']:.1f} examples/s"
    )
    n_steps, n_averaged = result["steps"], result["final_loss_steps"]
    which = "last step" if n_averaged == 1 else f"mean of the last {n_averaged} of {n_steps} steps"
    print(f"loss: {result['final_loss']:.3f} ({which})")
    if held_out := result.get("held_out"):
        _show_held_out(held_out, result)
    print(f"adapter: {result['adapter']}")
    if "best_adapter" in result:
        print(f"best adapter: {result['best_adapter']}")


def _show_held_out(held_out: dict[str, Any], result: dict[str, Any]) -> None:
    parts = (
        f"{held_out['first']:.3f} first",
        f"{held_out['best']:.3f} best (step {held_out['best_step']})",
        f"{held_out['last']:.3f} last",
    )
    print(f"held-out loss: {', '.join(parts)}")
    if result["steps"] < result["planned_steps"]:
        print(
            f"stopped early, after {result['steps']} of {result['planned_steps']} steps: "
            f"no better held-out loss in {held_out['n_since_best']} measurements"
        )
    elif held_out["last"] > 1.01 * held_out["best"] and "best_adapter" not in result:
        print("it was lowest before the end: --early-stopping 3 keeps that adapter too")


def show_scores(result: dict[str, Any]) -> None:
    """Print scores, of an evaluation or of existing outputs."""
    from swlora.evaluation.report import scores_table

    print(scores_table(result))
    if "predictions" in result:
        print(f"predictions: {result['predictions']}")
