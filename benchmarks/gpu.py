"""The GPU tests and the GPU benchmark, each part in a process and a time limit of its own.

    python -m benchmarks.gpu --out FOLDER [--tokens FILE] [--dry-run]

Called by `gpu.sh`. A part that fails or takes too long says so, and the next one runs. The table
comes last; gpu.json, and the log of every part, lie in the folder.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import runner

LIMIT_S = 525.0
TESTS = ("tests/gpu", "tests/training/test_loop_resume.py")
ON_BOTH = ("--shape", "smollm2-135m")
LONG = ("--shape", "8b", "--long", "4096", "--rows", "4", "--row-tokens", "4096", "--steps", "6")


class Part(NamedTuple):
    """`python -m` and its arguments, in so many seconds at most."""

    name: str
    arguments: Sequence[str]
    limit_s: float


def parts(dry: bool, tokens: Path) -> list[Part]:
    """Return what is run, the more important first."""
    given = ["--tokens", str(tokens.absolute())]
    short = ["--device", "cpu", "--shape", "tiny", "--row-tokens", "512"]
    short_rows = ["--rows", "12", "--steps", "4"]
    full = [*given, *(short + short_rows if dry else ON_BOTH)]
    long = [*short, "--long", "64", "--rows", "2", "--steps", "4"] if dry else LONG
    pytest = ["pytest", *TESTS, "-m", "gpu", "-v", "-p", "no:cacheprovider", "--maxfail", "12"]
    pytest += ["-o", "addopts=--import-mode=importlib --strict-markers"]
    return [
        Part("tests", pytest, 190),
        Part("ours", ["benchmarks.gpu_arm", "ours", *full], 80),
        Part("trl-packed", ["benchmarks.gpu_arm", "trl-packed", *full], 70),
        Part("8b", ["benchmarks.gpu_arm", "ours", *long], 110),
        Part("ours-flat", ["benchmarks.gpu_arm", "ours-flat", *full], 60),
        Part("peft-packed", ["benchmarks.gpu_arm", "peft-packed", *full], 60),
        Part("peft-padded", ["benchmarks.gpu_arm", "peft-padded", *full], 60),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="GPU tests and benchmark.")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--tokens", type=Path, default=Path("none"))
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny models")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.dry_run:
        os.environ["SWLORA_GPU_TESTS"] = "cpu"
    start_s = time.perf_counter()
    results: dict[str, runner.Result] = {}
    with tempfile.TemporaryDirectory(prefix="swlora-bench-") as compiled:
        for part in parts(args.dry_run, args.tokens):
            left_s = LIMIT_S - (time.perf_counter() - start_s)
            results[part.name] = _run(part, left_s, args.out, compiled)
            _write(args.out / "gpu.json", args.dry_run, results)
            elapsed_s = time.perf_counter() - start_s
            print(f"[{elapsed_s:4.0f} s] {part.name}: {_told(results[part.name])}")
    print("\ndry run: the numbers say nothing" if args.dry_run else "")
    print(table(results))


def _run(part: Part, left_s: float, out: Path, compiled: str) -> runner.Result:
    """Run a part; what it wrote to --json, or the end of what it printed."""
    if left_s < 15:
        return {"error": "left out: no time was left"}
    is_arm, result = part.arguments[0] != "pytest", out / f"{part.name}.json"
    command = [sys.executable, "-m", *part.arguments, *(["--json", str(result)] if is_arm else [])]
    own = {"TORCHINDUCTOR_CACHE_DIR": compiled, "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **own, "TOKENIZERS_PARALLELISM": "false"}
    log, start_s = out / f"{part.name}.log", time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                command,
                cwd=runner.ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=min(part.limit_s, left_s),
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    wall_s = time.perf_counter() - start_s
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "no message"
    if not is_arm:
        counts = [sum(f" {word}" in line for line in lines) for word in ("PASSED", "FAILED")]
        summary = last if code is not None else f"stopped after {wall_s:.0f} s"
        found = {"code": code, "passed": counts[0], "failed": _failed(lines), "wall_s": wall_s}
        return {"summary": f"{summary} ({counts[0]} passed, {counts[1]} failed)", **found}
    if code is None:
        return {"error": f"stopped after {wall_s:.0f} s: {last}", "wall_s": wall_s}
    if code or not result.is_file():
        return {"error": f"exit code {code}: {last}", "wall_s": wall_s}
    found = {**json.loads(result.read_text(encoding="utf-8")), "wall_s": wall_s}
    result.unlink()
    return found


def _failed(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if line.startswith(("FAILED", "ERROR")) or " FAILED" in line]


def _told(result: runner.Result) -> str:
    if text := result.get("error") or result.get("summary"):
        return "\n    ".join([text, *result.get("failed", [])])
    lines = [f"{result['examples_per_s']:.1f} rows/s, {result['step_ms']:.1f} ms a step"]
    return "\n    ".join(lines + result.get("said", []))


def _write(path: Path, dry: bool, results: dict[str, runner.Result]) -> None:
    from swlora.files import write_json

    facts = {"benchmark": "gpu", "dry_run": dry, "machine": runner.machine(), "gpu": _gpu()}
    write_json(path, {**facts, "ratios": ratios(results), "parts": results})


def _gpu() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    of = torch.cuda.get_device_properties(0)
    return {"name": of.name, "memory_bytes": of.total_memory, "cuda": torch.version.cuda}


def ratios(results: dict[str, runner.Result]) -> dict[str, float]:
    """Return ours by TRL's rate, and how much of the ideal sharing is realised."""
    good = {name: r for name, r in results.items() if "examples_per_s" in r}
    found: dict[str, float] = {}
    if {"ours", "trl-packed"} <= good.keys():
        rates = [good[name]["examples_per_s"] for name in ("ours", "trl-packed")]
        found["vs_trl_packed"] = rates[0] / rates[1]
    if {"ours", "ours-flat"} <= good.keys():
        nodes = good["ours"]["nodes_run"] / good["ours"]["steady_s"]
        tokens = good["ours-flat"]["nodes_run"] / good["ours-flat"]["steady_s"]
        found["realised_to_ideal"] = nodes / tokens
    return found


def table(results: dict[str, runner.Result]) -> str:
    """Return what was measured, one line an arm, and the ratios."""
    rows = []
    for name, r in results.items():
        if "examples_per_s" not in r:
            continue
        shares = [r.get("share_of_peak"), r.get("busy_share")]
        cells = [f"{r['examples_per_s']:.1f}", f"{r['tokens_per_s']:,.0f}", f"{r['step_ms']:.1f}"]
        cells += ["-" if share is None else f"{share:.1%}" for share in shares]
        rows.append([name, *cells, f"{r['peak_bytes'] / 1e9:.1f}" if r["peak_bytes"] else "-"])
    header = ["arm", "rows/s", "tokens/s", "ms a step", "of peak", "busy", "peak GB"]
    lines = [runner.table(header, rows)]
    lines += [f"{name}: {value:.2f}" for name, value in ratios(results).items()]
    lines += [f"{name}: {_told(r)}" for name, r in results.items() if "examples_per_s" not in r]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
