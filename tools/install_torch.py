"""Install PyTorch before the rest: its CPU build where there is no NVIDIA GPU.

    python tools/install_torch.py torch [options of pip install]

On Linux PyPI's wheel brings CUDA libraries of gigabytes. PyTorch's own index has the same version
without them. It is asked first where no NVIDIA GPU is seen; where it does not answer, nothing is
installed here, and whoever installs swlora next gets what pip's own settings name. TORCH_INDEX
names another index (of ROCm builds, say), which is then used or the command fails; empty, it turns
this off. A torch that is installed already and fits stays.
"""

import http.client
import os
import platform
import shutil
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
VARIABLE = "TORCH_INDEX"
LIMIT_S = 5.0  # for the index to answer; a page of it is 20 kB


def main(arguments: list[str]) -> int:
    """Install what `arguments` say from the index that fits; return the exit code."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return install(named, arguments) if named else 0
    if platform.system() != "Linux" or sees_nvidia_gpu():
        return 0
    if reason := why_unreachable(CPU_INDEX):
        print(
            f"{CPU_INDEX} does not answer ({reason}): installing the default build of PyTorch,"
            f" which may bring CUDA libraries of gigabytes. {VARIABLE}=URL names another index"
        )
        return 0
    print(f"no NVIDIA GPU here: the CPU build of PyTorch, from {CPU_INDEX}", flush=True)
    if install(CPU_INDEX, arguments) != 0:
        print("it has no build that fits: installing the default one")
    return 0


def sees_nvidia_gpu(dev: Path = Path("/dev"), path: str | None = None) -> bool:
    """Tell whether the driver shows an NVIDIA GPU: as a device, or (in WSL) by nvidia-smi."""
    if any(dev.glob("nvidia[0-9]*")):
        return True
    path = os.environ.get("PATH", "") if path is None else path
    tool = shutil.which("nvidia-smi", path=f"{path}{os.pathsep}/usr/lib/wsl/lib")
    if tool is None:
        return False
    try:
        said = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return said.returncode == 0 and "GPU " in said.stdout


def why_unreachable(
    index: str, limit_s: float = LIMIT_S, environ: Mapping[str, str] = os.environ
) -> str | None:
    """Return why the index shows no page of torch within `limit_s`, or None where it does."""
    certificates = environ.get("PIP_CERT") or None  # of a proxy that looks into what passes
    try:
        context = ssl.create_default_context(cafile=certificates)
        with urllib.request.urlopen(f"{index}/torch/", timeout=limit_s, context=context) as page:
            page.read(1)
    # URLError, time-outs and refused certificates are OSErrors; a proxy may answer anything at all
    except (OSError, http.client.HTTPException, ValueError) as error:
        said = str(getattr(error, "reason", error))
        return " ".join(said.split())[:200] or type(error).__name__
    return None


def install(index: str, arguments: list[str]) -> int:
    """Install from that index alone, without what torch needs; return pip's exit code."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
    return subprocess.run([*command, "--index-url", index, *arguments]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
