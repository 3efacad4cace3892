"""Training speed against peers: examples a second, memory, share of the machine's peak.

    python -m benchmarks.speed [--quick] --json F [--e2e FOLDER] [--arms a,b] [--rounds N]

On the embedded model (SmolLM2-135M) and E2E NLG. A quick run is one round of a few minutes' worth
of rows and ends within ten minutes (N times as many with `--rounds N`); a full one takes three
rounds. Ratios are of examples/s, rows of the data set and not tokens, since the arms run different
numbers of tokens for the same rows.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks import runner
from benchmarks.arms import ARMS, Arm, chosen
from benchmarks.rows import E2E_ROWS, find_e2e

QUICK_LIMIT_S = 585.0
Summary = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Training speed against peers.")
    parser.add_argument("--quick", action="store_true", help="one short round, ten minutes at most")
    parser.add_argument("--json", required=True, type=Path, help="where the results go")
    parser.add_argument("--e2e", type=Path, help="folder with trainset.csv (default: SWLORA_E2E)")
    parser.add_argument("--arms", help=f"comma-separated, of: {', '.join(ARMS)}")
    parser.add_argument("--rounds", type=int, help="how often every arm is run (1 quick, else 3)")
    parser.add_argument("--rows", type=int, help="rows that every arm is timed on")
    args = parser.parse_args()

    arms = chosen(args.arms, args.quick)
    n_rounds = args.rounds or (1 if args.quick else 3)
    model, data = runner.builtin_model(), find_e2e(args.e2e)
    limit_s = QUICK_LIMIT_S * n_rounds if args.quick else None
    turns, load = runner.Turns(limit_s), runner.load()
    turns.run({arm.name: _job(arm, model, data, args) for arm in arms}, n_rounds)
    summary = runner.summarise(turns.rounds)
    report = {
        "benchmark": "speed",
        "quick": args.quick,
        "machine": runner.machine(),
        "load_average": {"start": load, "end": runner.load()},
        "wall_s": turns.elapsed_s,
        "ratios": ratios(summary),
        "ratios_by_round": [ratios(runner.summarise([one])) for one in turns.rounds],
        "projected_s": {name: projected_s(one) for name, one in summary.items() if _ran(one)},
        "projected_rows": E2E_ROWS,
        "arms": summary,
        "rounds": turns.rounds,
    }
    from swlora.files import write_json

    write_json(args.json, report)
    print(show(report))


def _job(arm: Arm, model: str, data: Path, args: argparse.Namespace) -> tuple[str, list[str]]:
    n_rows = args.rows or arm.rows(args.quick) or arm.rows_full
    where = ["--model", model, "--data", str(data)]
    return "benchmarks.arm", [arm.name, *where, "--rows", str(n_rows)]


def ratios(summary: Summary) -> dict[str, float | None]:
    """Compare the arms' medians; None where an arm that it takes did not run."""
    peers = {name for name in summary if ARMS[name].is_peer and _ran(summary[name])}
    best = max((_rate(summary, name) or 0.0 for name in peers), default=None)
    at_32 = [name for name in peers if _step_rows(summary[name]) >= 30]
    fastest = max(at_32, key=lambda name: _rate(summary, name) or 0.0, default=None)
    memory = [summary[name]["peak_bytes"] for name in at_32]
    ours_memory = summary.get("ours-32", {}).get("peak_bytes")

    def over(name: str, other: float | None, epoch: int = 0) -> float | None:
        return _ratio(_rate(summary, name, epoch), other)

    return {
        "all_vs_best_peer": over("ours-32", best),
        "super_vs_best_peer": over("ours-11-28-29", best),
        "super_cached_vs_best_peer": over("ours-11-28-29", best, 1),
        "last2_vs_best_peer": over("ours-28-29", best),
        "last2_cached_vs_best_peer": over("ours-28-29", best, 1),
        "all_vs_original_recipe": over("ours-32", _rate(summary, "original")),
        "memory_vs_best_peer": _ratio(ours_memory, min(memory, default=None)),
        "gemm_share": _of_epoch(summary, "ours-32", "gemm_share"),
        # The same, seen from other sides
        "all_vs_peer_at_batch_32": over("ours-32", _rate(summary, fastest or "")),
        "all_batch_64_vs_best_peer": over("ours-64", best),
        "identified_vs_best_peer": over("ours-super", best),
        "identified_cached_vs_best_peer": over("ours-super", best, 1),
        "super_vs_same_layers": over("ours-11-28-29", _rate(summary, "peft-32-11-28-29")),
        "last2_vs_same_layers": over("ours-28-29", _rate(summary, "peft-32-28-29")),
        "memory_vs_fastest_peer": _ratio(
            ours_memory, summary[fastest]["peak_bytes"] if fastest else None
        ),
    }


def projected_s(one: dict[str, Any]) -> dict[str, float]:
    """Project the seconds of 1, 3 and 5 epochs over the whole data set, one-off costs included.

    A projection from measured rates, not a measurement; the time to import libraries is left out.
    """
    fixed_s = sum(one["one_off_s"].values()) + E2E_ROWS * sum(one["per_row_s"].values())
    first_s, later_s = (E2E_ROWS / one["epochs"][e]["examples_per_s"] for e in (0, -1))
    return {str(n): fixed_s + first_s + (n - 1) * later_s for n in (1, 3, 5)}


def show(report: dict[str, Any]) -> str:
    """Lay out the results for a person."""
    header = ("arm", "rows/step", "examples/s", "(range)", "later epochs", "tokens/row",
              "peak GB", "of GEMM peak", "1 epoch", "3", "5 epochs, s")  # fmt: skip
    lines = [
        (name, *_cells(one, report["projected_s"][name]))
        if _ran(one)
        else (name, *["-"] * (len(header) - 1))
        for name, one in report["arms"].items()
    ]
    reasons = [f"{n}: {one['error']}" for n, one in report["arms"].items() if not _ran(one)]
    found = [f"{k:32} {v:8.3f}" for k, v in report["ratios"].items() if v is not None]
    note = f"seconds of epochs: projected to {report['projected_rows']} rows from these rates"
    load = "load average {start[0]:.1f} to {end[0]:.1f}".format(**report["load_average"])
    machine = report["machine"]
    about = f"{machine['cpu']}, {machine['cores']} cores, {', '.join(machine['cpu_flags'])}; {load}"
    return "\n".join([runner.table(header, lines), *reasons, note, about, "", *found])


def _cells(one: dict[str, Any], seconds: dict[str, float]) -> list[str]:
    epochs = one["epochs"]
    first, later = epochs[0], epochs[1:]
    share = first.get("gemm_share")
    low, high = first["examples_per_s_range"]
    return [
        f"{_step_rows(one):.0f}",
        f"{first['examples_per_s']:.2f}",
        f"{low:.2f}-{high:.2f}",
        f"{later[0]['examples_per_s']:.2f}" if later else "",
        f"{first['tokens_run'] / first['rows']:.1f}",
        f"{one['peak_bytes'] / 1e9:.2f}",
        f"{share:.2f}" if share else "",
        *(f"{seconds[n]:.0f}" for n in ("1", "3", "5")),
    ]


def _ran(one: dict[str, Any]) -> bool:
    return "error" not in one


def _of_epoch(summary: Summary, name: str, key: str, epoch: int = 0) -> float | None:
    one = summary.get(name, {})
    return one["epochs"][epoch].get(key) if "epochs" in one else None


def _rate(summary: Summary, name: str, epoch: int = 0) -> float | None:
    return _of_epoch(summary, name, "examples_per_s", epoch)


def _step_rows(one: dict[str, Any]) -> float:
    """Return the rows of the data set a step, which a packed batch does not say itself."""
    return float(one["epochs"][0]["rows"] / one["epochs"][0]["steps"])


def _ratio(value: float | None, other: float | None) -> float | None:
    return None if value is None or not other else value / other


if __name__ == "__main__":
    main()
