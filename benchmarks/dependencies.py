"""What each package that swlora needs weighs: bytes on the disk, and the time to import it.

    python -m benchmarks.dependencies

`own` are the files of the package; `saved` those that would not be there without it: its own, and
of what nothing else needs. `alone` is an import in a new process, `beside torch` what is left of it
where torch and transformers are loaded, as in training. Medians of three.
"""

import importlib
import multiprocessing
import statistics
import subprocess
import sys
import time
from importlib.metadata import Distribution, distribution, packages_distributions

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

N_TIMES = 3
MB = 1e6
TIMED = "import time; s = time.perf_counter(); import {}; print(time.perf_counter() - s)"


def needs(of: Distribution) -> list[str]:
    """Return the names of the packages that are needed here, without extras."""
    wanted = [Requirement(text) for text in of.requires or []]
    return [
        canonicalize_name(one.name)
        for one in wanted
        if one.marker is None or one.marker.evaluate({"extra": ""})
    ]


def closure(names: list[str]) -> set[str]:
    """Return the names with all that they need."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += needs(distribution(name))
    return found


def size_bytes(name: str) -> int:
    """Return the bytes of a package's files, compiled ones included."""
    paths = [file.locate() for file in distribution(name).files or []]
    return sum(path.stat().st_size for path in paths if path.is_file())  # type: ignore[attr-defined]


def alone_s(module: str) -> float:
    """Return the seconds of an import in a new process."""
    command = [sys.executable, "-c", TIMED.format(module)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(said.splitlines()[-1])


def beside_torch_s(module: str) -> float:
    """Return the seconds of an import in a copy of this process, which has loaded torch."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(timed_import, (module,))


def timed_import(module: str) -> float:
    """Import a module here; return the seconds."""
    start_s = time.perf_counter()
    importlib.import_module(module)
    return time.perf_counter() - start_s


def main() -> None:
    for module in ("torch", "transformers"):
        importlib.import_module(module)
    direct = needs(distribution("swlora"))
    everything = closure(direct)
    sizes = {name: size_bytes(name) for name in everything}
    modules = {
        canonicalize_name(owner): module
        for module, owners in sorted(packages_distributions().items(), reverse=True)
        for owner in owners
        if not module.startswith("_")
    }
    print("| package | own, MB | saved, MB | alone, s | beside torch, s |\n|---|---|---|---|---|")
    for name in sorted(direct, key=lambda name: -sizes[name]):
        gone = everything - closure([other for other in direct if other != name])
        times = (
            statistics.median(timed(modules[name]) for _ in range(N_TIMES))
            for timed in (alone_s, beside_torch_s)
        )
        saved = sum(sizes[other] for other in gone)
        cells = (f"{sizes[name] / MB:.1f}", f"{saved / MB:.1f}", *(f"{s:.2f}" for s in times))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print(f"\n{len(everything)} packages, {sum(sizes.values()) / MB:.0f} MB")


if __name__ == "__main__":
    main()
