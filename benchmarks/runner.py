"""Runs arms in fresh processes, in turns, and gathers what they report.

Turns (A B C A B C ...) spread whatever else the machine does over all arms; a round's numbers are
kept, the median over the rounds is what is compared.
"""

import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("swlora", "torch", "transformers", "peft", "trl", "accelerate", "tokenizers", "numpy")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
Result = dict[str, Any]


class Job(NamedTuple):
    """`python -m module arguments`."""

    module: str
    arguments: Sequence[str]
    python: str = sys.executable


def builtin_model() -> str:
    """Return the folder of the embedded model, unpacked before any arm has a cache of its own."""
    from swlora.models.builtin import builtin_folder

    return str(builtin_folder())


def model_folder(name: str) -> str:
    """Return what a model is loaded from, whose name may be `builtin`."""
    return builtin_model() if name == "builtin" else name


def run_module(
    module: str,
    arguments: Sequence[str],
    timeout_s: float | None = None,
    python: str = sys.executable,
) -> Result:
    """Run `python -m module arguments --json F` with empty caches; return the JSON of F.

    A failure is a result too: {"error": the last line it wrote}.
    """
    with tempfile.TemporaryDirectory(prefix="swlora-bench-") as scratch:
        out = Path(scratch) / "result.json"
        environment = {
            **os.environ,
            "SWLORA_CACHE": str(Path(scratch) / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(Path(scratch) / "compiled"),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [python, "-m", module, *arguments, "--json", str(out)]
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"stopped after {timeout_s:.0f} s, the time that was left"}
        if done.returncode == -signal.SIGKILL:
            return {"error": "killed: most likely memory ran out"}
        if done.returncode != 0 or not out.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            reason = lines[-1].strip() if lines else "no message"
            return {"error": f"exit code {done.returncode}: {reason}"}
        return dict(json.loads(out.read_text(encoding="utf-8")))


class Turns:
    """Runs jobs in turns, within `limit_s` of wall clock where that is given."""

    def __init__(self, limit_s: float | None = None) -> None:
        self.start_s = time.perf_counter()
        self.limit_s = limit_s
        self.rounds: list[dict[str, Result]] = []

    def run(self, jobs: Mapping[str, Job | tuple[str, Sequence[str]] | str], n_rounds: int) -> None:
        """Run every job `n_rounds` times, one after another, round by round.

        A text in the place of a job says why it cannot run.
        """
        for number in range(n_rounds):
            results: dict[str, Result] = {}
            self.rounds.append(results)
            for name, job in jobs.items():
                left_s = None if self.limit_s is None else self.limit_s - self.elapsed_s
                if isinstance(job, str):
                    results[name] = {"error": job}
                elif left_s is not None and left_s < 20:
                    results[name] = {"error": "left out: no time was left"}
                else:
                    module, arguments, python = Job(*job)
                    results[name] = run_module(module, arguments, left_s, python)
                _say(number, n_rounds, name, results[name], self.elapsed_s)

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.start_s


def _say(number: int, n_rounds: int, name: str, result: Result, elapsed_s: float) -> None:
    outcome = result.get("error") or ", ".join(
        f"{epoch['examples_per_s']:.2f} examples/s" for epoch in result["epochs"]
    )
    print(
        f"[{elapsed_s:5.0f} s] round {number + 1}/{n_rounds}  {name}: {outcome}",
        file=sys.stderr,
        flush=True,
    )


def machine() -> Result:
    """Return what the numbers depend on: the processor, the memory, the versions, the load."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info)}
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": facts.get("model name", platform.processor()),
        "cpu_family_model": f"{facts.get('cpu family', '?')}/{facts.get('model', '?')}",
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in facts.get("flags", "").split()],
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory_bytes,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def load() -> list[float]:
    """Return the load averages over 1, 5 and 15 minutes."""
    return list(os.getloadavg())


def summarise(rounds: list[dict[str, Result]]) -> dict[str, Result]:
    """Return, by arm, the medians over the rounds in which it ran, or why it never did."""
    names = list(dict.fromkeys(name for results in rounds for name in results))
    summary: dict[str, Result] = {}
    for name in names:
        results = [r[name] for r in rounds if name in r]
        good = [r for r in results if "error" not in r]
        summary[name] = _medians(good) if good else {"error": results[-1]["error"]}
    return summary


def middle(values: list[Any]) -> float:
    """Return the median as a float."""
    return float(statistics.median(values))


def _medians(results: list[Result]) -> Result:
    epochs = []
    for e in range(len(results[0]["epochs"])):
        of_epoch = [r["epochs"][e] for r in results]
        rates = [epoch["examples_per_s"] for epoch in of_epoch]
        keys = [k for k, v in of_epoch[0].items() if isinstance(v, int | float)]
        epochs.append(
            {
                **{k: middle([epoch[k] for epoch in of_epoch]) for k in keys},
                "examples_per_s_range": [min(rates), max(rates)],
            }
        )
    first = results[0]
    return {
        **{k: first.get(k) for k in ("kind", "batch", "layers", "layout", "dtype", "threads")},
        **{k: first[k] for k in ("packages", "loss_check") if k in first},
        "rounds": len(results),
        "epochs": epochs,
        "peak_bytes": middle([r["memory"]["peak_bytes"] for r in results]),
        "train_peak_bytes": middle([r["memory"]["train_peak_bytes"] for r in results]),
        "rss_before_bytes": middle([r["memory"]["rss_before_bytes"] for r in results]),
        "gemm_flops": middle([r["gemm_flops"] for r in results]),
        "train_loss": middle([r["train_loss"] for r in results]),
        "one_off_s": _each(results, "one_off_s"),
        "per_row_s": _each(results, "per_row_s"),
    }


def _each(results: list[Result], key: str) -> dict[str, float]:
    names = results[0][key]
    return {name: middle([r[key][name] for r in results]) for name in names}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out text cells in columns; the first is flush left, the others right."""
    lines = [header, *rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
