"""Whether an epoch costs in proportion to its rows: layers {28, 29}, one epoch, a fit.

python -m benchmarks.scaling [--rows 5000,10000,20000,42061] --json F [--e2e FOLDER]

seconds = slope * rows + intercept, by least squares; the largest residual says how far from
linear it is
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import runner
from benchmarks.rows import E2E_ROWS, find_e2e

ARM = "ours-28-29"


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds an epoch against rows.")
    parser.add_argument("--rows", default=f"5000,10000,20000,{E2E_ROWS}", help="comma-separated")
    parser.add_argument("--json", required=True, type=Path, help="where the results go")
    parser.add_argument("--e2e", type=Path, help="folder with trainset.csv (default: SWLORA_E2E)")
    args = parser.parse_args()

    sizes = sorted({int(part) for part in args.rows.split(",")})
    if len(sizes) < 2:
        parser.error("--rows needs two sizes or more")
    where = ["--model", runner.builtin_model(), "--data", str(find_e2e(args.e2e))]
    jobs = {
        str(n): ("benchmarks.arm", [ARM, *where, "--rows", str(n), "--epochs", "1"]) for n in sizes
    }
    turns, load = runner.Turns(), runner.load()
    turns.run(jobs, 1)
    results = turns.rounds[0]
    failed = [f"{n} rows: {r['error']}" for n, r in results.items() if "error" in r]
    points = [_point(n, results[str(n)]) for n in sizes if "error" not in results[str(n)]]
    if len(points) < 2:
        raise SystemExit("; ".join(failed))
    done = [p["rows"] for p in points]
    report = {
        "benchmark": "scaling",
        "arm": ARM,
        "machine": runner.machine(),
        "load_average": {"start": load, "end": runner.load()},
        "points": points,
        "fit": {key: fit(done, [p[key] for p in points]) for key in ("epoch_s", "preparation_s")},
        "runs": results,
    }
    from swlora.files import write_json

    write_json(args.json, report)
    header = ("rows", "epoch, s", "examples/s", "preparation, s", "peak GB")
    lines = [
        (str(p["rows"]), f"{p['epoch_s']:.1f}", f"{p['rows'] / p['epoch_s']:.2f}",
         f"{p['preparation_s']:.1f}", f"{p['peak_bytes'] / 1e9:.2f}")
        for p in points
    ]  # fmt: skip
    print(runner.table(header, lines))
    for key, found in report["fit"].items():
        print(f"{key}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    if failed:
        raise SystemExit("not run: " + "; ".join(failed))


def _point(n_rows: int, result: dict[str, Any]) -> dict[str, Any]:
    per_row_s = sum(result["per_row_s"].values())
    fixed_s = sum(v for k, v in result["one_off_s"].items() if k != "warmup")
    return {
        "rows": n_rows,
        "epoch_s": result["epochs"][0]["total_s"],
        "preparation_s": fixed_s + per_row_s * n_rows,
        "peak_bytes": result["memory"]["peak_bytes"],
    }


def fit(sizes: list[int], seconds: list[float]) -> dict[str, float]:
    """Fit a line by least squares; the largest residual is relative to the measurement."""
    x, y = np.asarray(sizes, dtype=float), np.asarray(seconds)
    slope, intercept = np.polyfit(x, y, 1)
    residual = y - (slope * x + intercept)
    spread = float(((y - y.mean()) ** 2).sum())
    return {
        "s_per_1000_rows": float(1000 * slope),
        "intercept_s": float(intercept),
        "r_squared": 1 - float((residual**2).sum()) / spread,
        "largest_residual": float(np.abs(residual / y).max()),
    }


if __name__ == "__main__":
    main()
