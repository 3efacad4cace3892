"""Which layer: what LoRA in each one alone comes to, beside its gradient before the first step.

    python -m benchmarks.recipes --json F --points 1 --budget 256 \
        --recipes 'order=pairs batch=16 layers=0|1|2|3 rate=8e-3|1.6e-2'
    python -m benchmarks.recipes.layer_curve --cases F --json layers.json --picture layers.svg

The loss of a layer is the lowest mean over seeds that a rate came to with that layer alone; the
gradient is the L1 norm by which `--layers auto` proposes layers (`swlora.training.layer_profile`).
Spearman's correlation says how well one orders the layers as the other does.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import runner
from benchmarks.recipes.recipe import Recipe
from benchmarks.recipes.results import Case, known_as, read
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
    made.add_argument("--model", help="where the model of --cases lies, if in a folder or file")
    made.add_argument("--e2e", type=Path, help="folder with trainset.csv (default: SWLORA_E2E)")
    args = made.parse_args()
    try:
        report = read(args.cases)
        layers = by_layer(report["cases"])
        data = Recipe.parse(layers[0]["recipe"]).data
        model = model_of(report, args.model)
        rows = with_gradients(layers, gradient_norms(model, data, args.e2e))
    except UserError as error:
        raise SystemExit(str(error)) from error
    found = {"benchmark": "layer_curve", "model": report["model"], "layers": rows}
    found["rank_correlation"] = rank_correlation(
        [-row["nll"] for row in rows], [row["gradient_l1"] for row in rows]
    )
    write_json(args.json, found)
    draw(found, args.picture)
    for row in rows:
        print(f"layer {row['layer']:2}: {row['nll']:.4f} nats, gradient {row['gradient_l1']:.3g}")
    if found["rank_correlation"] is not None:
        print(f"rank correlation of gradient and gain: {found['rank_correlation']:+.2f}")


def model_of(report: dict[str, Any], given: str | None) -> str:
    """Return what the model of a report is loaded from; UserError where `given` is another one."""
    if given is not None and known_as(given) != report["model"]:
        raise UserError(f"the cases are of the model {report['model']}, not of {given}")
    return given or str(report["model"])


def by_layer(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Return what training each layer alone came to, with the recipe; UserError for no such case.

    Of the rates of a layer that failed with no seed, the best is that with the most seeds and then
    the lowest mean. `at_edge` says whether it is the lowest or the highest that was tried there.
    UserError too where the trainings differ in more than their layer and rate.
    """
    alone = [case for case in cases if case["settings"]["layers"].isdigit()]
    _refuse_others(alone)
    by_rate: dict[int, dict[float, list[Case]]] = {}
    for case in alone:
        layer, rate = int(case["settings"]["layers"]), case["settings"]["rate"]
        by_rate.setdefault(layer, {}).setdefault(rate, []).append(case)
    rows = [row for layer, own in sorted(by_rate.items()) if (row := _best(layer, own))]
    if len(rows) < 2:
        raise UserError("there are no two layers that were trained alone: layers=0|1|2|...")
    return rows


def _refuse_others(cases: Sequence[Case]) -> None:
    """Raise UserError where the cases differ in more than layer and rate."""
    for key in cases[0]["settings"].keys() - {"layers", "rate"} if cases else ():
        values = sorted({str(case["settings"][key]) for case in cases})
        if len(values) > 1:
            raise UserError(f"the single layers were trained with {key}={' and '.join(values)}")


def _best(layer: int, by_rate: dict[float, list[Case]]) -> dict[str, Any] | None:
    """Return the row of a layer; None where no rate came through."""

    def losses(rate: float) -> list[float]:
        return [case["dev"]["nll"] for case in by_rate[rate]]

    good = [r for r, own in by_rate.items() if not any("error" in case for case in own)]
    if not good:
        return None
    best = min(good, key=lambda rate: (-len(by_rate[rate]), np.mean(losses(rate))))
    return {
        "layer": layer,
        "nll": float(np.mean(losses(best))),
        "seeds": len(by_rate[best]),
        "recipe": by_rate[best][0]["recipe"],
        "at_edge": best in (min(by_rate), max(by_rate)),
    }


def with_gradients(
    rows: Sequence[dict[str, Any]], gradients: Sequence[float]
) -> list[dict[str, Any]]:
    """Add the gradient of each layer to its row; UserError for a layer that the model has not."""
    if rows[-1]["layer"] >= len(gradients):
        raise UserError(f"layer {rows[-1]['layer']} is not in a model of {len(gradients)} layers")
    return [row | {"gradient_l1": gradients[row["layer"]]} for row in rows]


def gradient_norms(model: str, data: str, e2e: Path | None) -> list[float]:
    """Return the gradient of every layer at the start: L1 norms, nats a token and unit of rate."""
    from benchmarks.recipes.rows import Data
    from swlora.config import ModelSpec, RunSpec, TrainSpec
    from swlora.models.load import load_model
    from swlora.training.layer_profile import profile
    from swlora.training.schedule import Schedule

    loaded = load_model(ModelSpec(name=runner.model_folder(model)))
    rows = Data(data, loaded, e2e).train.sequences
    spec = RunSpec(train=TrainSpec(batch_size=GRADIENT_ROWS))
    step = next(Schedule.of(rows, spec.train, spec.seed).steps())
    return profile(loaded.model, rows, spec, [step], print).gradient_norms


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return Spearman's correlation, equal values at their mean rank; None if all are equal."""
    ranks = [_mean_ranks(values) for values in (a, b)]
    if not all(np.ptp(one) for one in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def _mean_ranks(values: Sequence[float]) -> NDArray[np.float64]:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


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
        below.xaxis.get_major_locator().set_params(integer=True)
        figure.canvas.draw()  # which places them


if __name__ == "__main__":
    main()
