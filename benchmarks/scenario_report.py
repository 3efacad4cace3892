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
    reasons = [
        f"- {name}, {arm}: {one['error']}"
        for name, scenario in report["scenarios"].items()
        for arm, one in scenario["arms"].items()
        if "error" in one
    ]
    checks = [
        f"- {name}, {arm}: {check['unsloth']:.4f} and {check['peft']:.4f}"
        for name, scenario in report["scenarios"].items()
        for arm, one in scenario["arms"].items()
        if (check := one.get("loss_check"))
    ]
    return "\n".join(
        [
            table,
            *_listed("Loss of one batch, Unsloth's and plain PEFT's with its adapter:", checks),
            *_listed("Not run:", reasons),
        ]
    )


def _listed(title: str, lines: list[str]) -> list[str]:
    return ["", title, "", *lines] if lines else []


def _line(scenario: dict[str, Any]) -> tuple[str, ...]:
    arms, found = scenario["arms"], scenario["ratios"]
    best = found["best_peer"]
    ours, peer = arms.get("ours", {}), arms.get(best, {})
    return (
        scenario["title"],
        _number(scenario["tokens_a_row"], 0),
        _number(found["ideal"]),
        _number(found["realised"]),
        _number(found["realised_vs_ideal"]),
        _rate_cell(ours),
        best or "-",
        _rate_cell(peer),
        _number(found["vs_best_peer"]),
        _memory_cell(ours),
        _memory_cell(peer),
        _number(found["memory_vs_best_peer"]),
        _number(found["gemm_share"]),
    )


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _rate_cell(one: dict[str, Any]) -> str:
    return _number(rate(one) if "epochs" in one else None)


def _memory_cell(one: dict[str, Any]) -> str:
    return _number(one["peak_bytes"] / 1e9 if "peak_bytes" in one else None)
