"""The machine as swlora sees it, and what follows for a training on it."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from swlora import caches
from swlora.config.train import TRACKERS
from swlora.cores import n_usable_cores
from swlora.disk_space import free_bytes, size
from swlora.errors import UserError
from swlora.matrix_peak import measured_peak, processor
from swlora.memory import available_bytes
from swlora.models.precision import bfloat16_is_fast, resolve_device, resolve_dtype
from swlora.paths import cache_dir
from swlora.plural import counted
from swlora.progress import Progress
from swlora.threads import settle_threads
from swlora.versions import installed_version, package_versions

MORE_PACKAGES = ("datasets", "numpy", "ray", *TRACKERS)
VARIABLES = ("SWLORA_CACHE", "SWLORA_E2E", "SWLORA_LLAMA_CPP", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")


@dataclass(frozen=True)
class Gpu:
    """A device of CUDA."""

    name: str
    memory_bytes: int
    capability: str


@dataclass(frozen=True)
class MachineFacts:
    """What was found; `peaks_flops` are the best matrix products so far, by dtype, measured now.

    `llama_cpp` says what would be used, or why nothing is; `dtype` and `device` are what a training
    takes that leaves both to `auto`, with `threads` threads where nobody else needs the cores.
    """

    system: str
    processor: str
    n_cores: int
    memory_bytes: int
    memory_free_bytes: int
    has_bfloat16: bool
    peaks_flops: dict[str, float]
    gpus: list[Gpu]
    packages: dict[str, str]
    variables: dict[str, str]
    llama_cpp: str
    cache: str
    cache_bytes: int
    cache_free_bytes: int
    device: str
    dtype: str
    threads: int


def machine_facts(progress: Progress) -> MachineFacts:
    """Look at the machine, and measure its matrix products: about a second, longer on slow ones."""
    import psutil
    import torch

    settle_threads(None)  # as a training that names no number
    device = resolve_device("auto")
    dtype = resolve_dtype("auto", device)
    with progress.task("measure matrix products"):
        dtypes = dict.fromkeys((dtype, torch.float32))
        peaks = {str(d).removeprefix("torch."): measured_peak(d, device.type) for d in dtypes}
    folder = cache_dir()
    return MachineFacts(
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        processor=processor(),
        n_cores=n_usable_cores(),
        memory_bytes=int(psutil.virtual_memory().total),
        memory_free_bytes=available_bytes(),
        has_bfloat16=bfloat16_is_fast(),
        peaks_flops=peaks,
        gpus=_gpus(),
        packages={**package_versions(), **_more_packages()},
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        llama_cpp=_llama_cpp(),
        cache=str(folder),
        cache_bytes=sum(entry.n_bytes for entry in caches.entries()),
        cache_free_bytes=free_bytes(folder),
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


def _gpus() -> list[Gpu]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for number in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(number)
        found.append(Gpu(of.name, of.total_memory, f"{of.major}.{of.minor}"))
    return found


def _more_packages() -> dict[str, str]:
    return {name: found for name in MORE_PACKAGES if (found := installed_version(name))}


def _llama_cpp() -> str:
    from swlora.deploy.llama_cpp import INSTALL, find_llama_cpp

    try:
        found = find_llama_cpp()
    except UserError as error:
        return str(error)
    return f"{found.name} in {Path(found.package)}" if found else f"not found ({INSTALL})"


def lines(facts: MachineFacts) -> list[tuple[str, str]]:
    """Return the facts as names and values for a person, and what follows from them."""
    peaks = ", ".join(f"{value / 1e12:.2f} in {name}" for name, value in facts.peaks_flops.items())
    gpus = "; ".join(f"{g.name}, {size(g.memory_bytes)}" for g in facts.gpus)
    versions = ", ".join(f"{name} {version}" for name, version in facts.packages.items())
    bf16 = "yes" if facts.has_bfloat16 else "no, float32 is faster"
    memory = f"{size(facts.memory_bytes)}, {size(facts.memory_free_bytes)} of it free"
    cache = f"{facts.cache}: {size(facts.cache_bytes)}, {size(facts.cache_free_bytes)} free"
    found = [
        ("system", facts.system),
        ("processor", f"{facts.processor}, {counted(facts.n_cores, 'core')} for this process"),
        ("memory", memory),
        ("GPU", gpus or "none that torch sees"),
        ("bfloat16 products", bf16),
        ("matrix peak, TFLOP/s", peaks),
        ("versions", versions),
        ("llama.cpp", facts.llama_cpp),
        ("cache", cache),
        *((name, value) for name, value in facts.variables.items()),
    ]
    how = f"on {facts.device}, in {facts.dtype}"
    if facts.device == "cpu":
        n = facts.threads
        how += f", with {counted(n, 'thread')}, fewer while other programs need the cores"
    return [
        *found,
        ("a training here", f"runs {how}, unless --device, --dtype or --threads say else"),
    ]
