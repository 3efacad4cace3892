"""Freed memory stays with the process, and its peak is the process's own."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from swlora.memory import keep_freed_memory
took_effect = keep_freed_memory() if sys.argv[1] == "keep" else False
def fill():
    block = bytearray(48 << 20)  # above the size up to which glibc would adapt by itself
    del block
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    fill()
print(took_effect, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> tuple[bool, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True
    )
    took_effect, n_faults = done.stdout.split()
    return took_effect == "True", int(n_faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator only")
def test_large_blocks_are_not_mapped_anew() -> None:
    took_effect, kept = faults("keep")
    if not took_effect:
        pytest.skip("the C library is not glibc")
    _, fresh = faults("default")
    assert kept < fresh / 10


PEAK_PROGRAM = """
from swlora.memory import peak_memory_bytes
before = peak_memory_bytes("cpu")
block = bytearray(b"x") * (200 << 20)
del block
print(before, peak_memory_bytes("cpu"))
"""


def test_the_peak_is_this_programs_own() -> None:
    """A large parent does not count, and what was given back does."""
    parent = bytearray(b"x") * (300 << 20)
    done = subprocess.run(
        [sys.executable, "-c", PEAK_PROGRAM], capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stdout.split())
    assert 5 << 20 < before < len(parent)
    assert 195 << 20 < after - before < 205 << 20
