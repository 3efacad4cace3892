"""Which layer: what LoRA in each one alone comes to, beside its gradient before the first step.

    python -m benchmarks.recipes --json F --points 1 --budget 256 \
        --recipes 'order=pairs batch=16 layers=0|1|2|3 rate=8e-3|1.6e-2'
    python -m benchmarks.recipes.layer_curve --cases F --json layers.json --picture layers.svg

The loss of a layer is the lowest mean over seeds that a recipe with that layer alone came to; the
gradient is the L1 norm by which `--layers auto` proposes layers (`swlora.training.layer_profile`).
Spearman's correlation says how well one orders the layers as the other does.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import runner
from benchmarks.recipes.recipe import Recipe
from benchmarks.recipes.results import Case, read
from swlora.errors import UserError
from swlora.files import write_json
from swlora.study.figures import FOUND, GREY, STYLES, dress_panel, figure_file

GRADIENT_ROWS = 64


def main() -> None:
    """Measure the gradients, write the table of both and draw it."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--cases", type=Path, required=True, help="results of benchmarks.recipes")
    made.add_argument("--json", type=Path, required=True, help="where the table goes")
    made.add_argument("--picture", type=Path, required=True, help="where the picture goes")
    made.add_argument("--e2e", type=Path, help="folder with trainset.csv (default: SWLORA_E2E)")
    args = made.parse_args()
    try:
        report = read(args.cases)
        layers = by_layer(report["cases"])
        gradients = gradient_norms(report["model"], args.e2e)
    except UserError as error:
        raise SystemExit(str(error)) from error
    rows = [row | {"gradient_l1": gradients[row["layer"]]} for row in layers]
    found = {"benchmark": "layer_curve", "model": report["model"], "layers": rows}
    found["rank_correlation"] = rank_correlation(
        [-row["nll"] for row in rows], [row["gradient_l1"] for row in rows]
    )
    write_json(args.json, found)
    draw(found, args.picture)
    for row in rows:
        print(f"layer {row['layer']:2}: {row['nll']:.4f} nats, gradient {row['gradient_l1']:.3g}")
    print(f"rank correlation of gradient and gain: {found['rank_correlation']:+.2f}")


def by_layer(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Return what training each layer alone came to, with the recipe; UserError for no such case.

    `at_edge` says whether its rate is the lowest or the highest that was tried in that layer.
    """
    losses: dict[int, dict[str, list[float]]] = {}
    for case in cases:
        layer = case["settings"]["layers"]
        if layer.isdigit() and "error" not in case:
            own = losses.setdefault(int(layer), {})
            own.setdefault(case["recipe"], []).append(case["dev"]["nll"])
    if len(losses) < 2:
        raise UserError("there are no two layers that were trained alone: layers=0|1|2|...")
    rows = []
    for layer, own in sorted(losses.items()):
        best = min(own, key=lambda recipe: np.mean(own[recipe]))
        rates = sorted({Recipe.parse(recipe).rate for recipe in own})
        rows.append(
            {
                "layer": layer,
                "nll": float(np.mean(own[best])),
                "seeds": len(own[best]),
                "recipe": best,
                "at_edge": Recipe.parse(best).rate in (rates[0], rates[-1]),
            }
        )
    return rows


def gradient_norms(model: str, e2e: Path | None) -> list[float]:
    """Return the gradient of every layer at the start: L1 norms, nats a token and unit of rate."""
    from benchmarks.recipes.rows import Data
    from swlora.config import ModelSpec, RunSpec, TrainSpec
    from swlora.models.load import load_model
    from swlora.training.layer_profile import profile
    from swlora.training.schedule import Schedule

    loaded = load_model(ModelSpec(name=runner.model_folder(model)))
    rows = Data("e2e", loaded, e2e).train.sequences
    spec = RunSpec(train=TrainSpec(batch_size=GRADIENT_ROWS))
    step = next(Schedule.of(rows, spec.train, spec.seed).steps())
    return profile(loaded.model, rows, spec, [step], print).gradient_norms


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's correlation of two lists without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def draw(found: dict[str, Any], target: Path) -> None:
    """Draw the loss of every layer, and its gradient below, as PNG or SVG."""
    with figure_file(target, (7, 5)) as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        numbers = [row["layer"] for row in found["layers"]]
        losses = [row["nll"] for row in found["layers"]]
        above.plot(numbers, losses, marker="o", color=STYLES[FOUND].color)
        dress_panel(above, "", "held-out NLL of this layer alone,\nnats a token")
        below.bar(numbers, [row["gradient_l1"] for row in found["layers"]], color=GREY)
        dress_panel(below, "layer", "gradient at the start,\nL1 norm")
        figure.canvas.draw()  # which places them


if __name__ == "__main__":
    main()
