"""What the scenarios say: sharing, rates and memory against the best of all peers, as a table.

ideal ratio     = tokens of the rows : nodes of our trees, in the steps that were timed
realised ratio  = examples/s of our engine : the same with nothing shared (`benchmarks.flat`)
"""

from typing import Any

from benchmarks.arms import SCENARIO_ARMS

Summary = dict[str, dict[str, Any]]
HEADER = ("scenario", "tokens a row", "ideal ratio", "realised", "realised : ideal", "examples/s",
          "best peer", "its examples/s", "ratio", "memory, GB", "best peer's", "ratio",
          "share of bf16 peak")  # fmt: skip


def ratios(summary: Summary) -> dict[str, Any]:
    """Compare the medians of a scenario's arms; None where an arm that it takes did not run."""
    ran = {name: one for name, one in summary.items() if "error" not in one}
    ours, flat = ran.get("ours"), ran.get("ours-flat")
    peers = {name: one for name, one in ran.items() if SCENARIO_ARMS[name].is_peer}
    best = max(peers, key=lambda name: rate(peers[name]), default=None)
    first = ours["epochs"][0] if ours else None
    ideal = first["tokens"] / first["tokens_run"] if first else None
    realised = rate(ours) / rate(flat) if ours and flat else None
    rates = {name: rate(ours) / rate(one) for name, one in peers.items()} if ours else {}
    memory = {n: ours["peak_bytes"] / one["peak_bytes"] for n, one in peers.items()} if ours else {}
    return {
        "ideal": ideal,
        "realised": realised,
        "realised_vs_ideal": realised / ideal if realised and ideal else None,
        "best_peer": best,
        "vs_best_peer": rates.get(best or ""),
        "vs_peers": rates,
        "memory_vs_best_peer": memory.get(best or ""),
        "memory_vs_peers": memory,
        "gemm_share": first["gemm_share"] if first else None,
    }


def rate(one: dict[str, Any]) -> float:
    """Return the examples/s of an arm that ran."""
    return float(one["epochs"][0]["examples_per_s"])


def markdown(report: dict[str, Any]) -> str:
    """Return the table of scenarios, and below it losses held together and why arms did not run."""
    lines = [HEADER, ("---",) * len(HEADER)]
    lines += [_line(scenario) for scenario in report["scenarios"].values()]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([table, *notes(report["scenarios"])])


def notes(cases: Summary) -> list[str]:
    """Return what stands below a table: losses held together, and why arms did not run."""
    arms = [(f"- {n}, {arm}:", one) for n, of in cases.items() for arm, one in of["arms"].items()]
    reasons = [f"{what} {one['error']}" for what, one in arms if "error" in one]
    checks = [
        f"{what} {check['unsloth']:.4f} and {check['peft']:.4f}"
        for what, one in arms
        if (check := one.get("loss_check"))
    ]
    return [
        *_listed("Loss of one batch, Unsloth's and plain PEFT's with its adapter:", checks),
        *_listed("Not run:", reasons),
    ]


def _listed(title: str, lines: list[str]) -> list[str]:
    return ["", title, "", *lines] if lines else []


def _line(scenario: dict[str, Any]) -> tuple[str, ...]:
    arms, found = scenario["arms"], scenario["ratios"]
    best = found["best_peer"]
    ours, peer = arms.get("ours", {}), arms.get(best, {})
    return (
        scenario["title"],
        number(scenario["tokens_a_row"], 0),
        number(found["ideal"]),
        number(found["realised"]),
        number(found["realised_vs_ideal"]),
        rate_cell(ours),
        best or "-",
        rate_cell(peer),
        number(found["vs_best_peer"]),
        memory_cell(ours),
        memory_cell(peer),
        number(found["memory_vs_best_peer"]),
        number(found["gemm_share"]),
    )


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def rate_cell(one: dict[str, Any]) -> str:
    return number(rate(one) if "epochs" in one else None)


def memory_cell(one: dict[str, Any]) -> str:
    return number(one["peak_bytes"] / 1e9 if "peak_bytes" in one else None)
