"""What a person is shown when work is done: results as lines and small tables, on stdout."""

from typing import Any


def show_candidates(result: dict[str, Any]) -> None:
    """Print what `pipeline.identify` found."""
    print(f"perplexity of the intact model: {result['perplexity']:.2f}")
    header = ("layer", "module", "out", "in", "weight", "ratio", "verdict")
    rows = [
        (
            str(c["layer"]),
            c["module"],
            str(c["out_channel"]),
            str(c["in_channel"]),
            f"{c['weight']:.3f}",
            f"{c['ratio']:.2f}",
            c["verdict"],
        )
        for c in result["candidates"]
    ]
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    for row in [header, *rows]:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    if result["layers"]:
        print(f"layers with a verified super weight: {', '.join(map(str, result['layers']))}")
    else:
        print("no super weight: setting any one candidate to zero barely matters in this model")
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
