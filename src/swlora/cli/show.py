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
    print(f"adapter: {result['adapter']}")


def show_scores(result: dict[str, Any]) -> None:
    """Print scores, of an evaluation or of existing outputs."""
    from swlora.evaluation.report import scores_table

    print(scores_table(result))
    if "predictions" in result:
        print(f"predictions: {result['predictions']}")
