"""Freed memory stays with the process, kernels do not, and its peak is the process's own."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from tests.support.control_groups import lay_groups

from swlora import memory
from swlora.memory import KERNELS_KEPT, available_bytes, free_swap_bytes, keep_few_kernels

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


KERNELS_PROGRAM = """
import ctypes, sys
import torch
from swlora import memory
if sys.argv[1] == "few":
    memory.keep_few_kernels()

class Usage(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena ordblks smblks hblks hblkhd usmblks "
                "fsmblks in_use_bytes fordblks keepcost").split()]

mallinfo2 = getattr(ctypes.CDLL("libc.so.6"), "mallinfo2", None)
if mallinfo2 is None or not torch.backends.mkldnn.is_available():
    sys.exit("nothing to measure here")
mallinfo2.restype = Usage
packed = torch.ops.mkldnn._reorder_linear_weight(torch.randn(96, 64), 64)
def multiply(sizes):
    for n_rows in sizes:
        torch.ops.mkldnn._linear_pointwise.default(
            torch.ones(n_rows, 64), packed, None, "none", [], "")
    return mallinfo2().in_use_bytes
before = multiply(range(1, 80))
print(multiply(range(80, 600)) - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator only")
def test_kernels_of_old_shapes_are_let_go() -> None:
    kept_bytes = {}
    clean = {k: v for k, v in os.environ.items() if not k.endswith("CACHE_CAPACITY")}
    for mode in ("few", "default"):
        done = subprocess.run(
            [sys.executable, "-c", KERNELS_PROGRAM, mode], capture_output=True, text=True, env=clean
        )
        if "nothing to measure" in done.stderr:
            pytest.skip("the kernels are not oneDNN's, or the C library is not glibc")
        kept_bytes[mode] = int(done.stdout)
    assert kept_bytes["default"] > 520 * 1000
    assert kept_bytes["few"] < kept_bytes["default"] / 10


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "")  # so that it is given back in the end
    monkeypatch.delenv("LRU_CACHE_CAPACITY")
    keep_few_kernels()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
    assert os.environ["LRU_CACHE_CAPACITY"] == str(KERNELS_KEPT)


def test_what_is_free_in_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_groups(monkeypatch, tmp_path, "", {})
    assert available_bytes() > 0  # on the machine
    files = {"memory.current": "700", "memory.max": "1000"}
    lay_groups(monkeypatch, tmp_path, "", files)
    assert available_bytes() == 300
    kept = {"memory.stat": "inactive_file 300\nactive_file 100"}
    lay_groups(monkeypatch, tmp_path, "", kept)
    assert available_bytes() == 700
    lay_groups(monkeypatch, tmp_path, "0::/job", {"job/memory.current": "1", "job/memory.max": "5"})
    assert available_bytes() == 4
    lay_groups(monkeypatch, tmp_path, "", {"memory.max": "max"})
    assert available_bytes() > 1000


def test_the_swap_that_is_free_in_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=800))
    lay_groups(monkeypatch, tmp_path, "", {})
    assert free_swap_bytes() == 800
    files = {"memory.swap.current": "200", "memory.swap.max": "500"}
    lay_groups(monkeypatch, tmp_path, "", files)
    assert free_swap_bytes() == 300
    lay_groups(monkeypatch, tmp_path, "", {"memory.swap.max": "5000"})
    assert free_swap_bytes() == 800


def test_the_limit_on_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_free_bytes", None)
    monkeypatch.setattr(memory, "_asked_bytes", None)
    monkeypatch.setattr(memory, "available_bytes", lambda: 4_000_000)
    assert memory.copies_limit_bytes() == 3_000_000
    monkeypatch.setattr(memory, "available_bytes", lambda: 1)
    assert memory.copies_limit_bytes() == 3_000_000, "what copies hold is not free any more"
    memory.limit_memory(0.5)
    assert memory.copies_limit_bytes() == 500_000_000
    memory.limit_memory(None)  # a later training of this process, which is not limited
    assert memory.copies_limit_bytes() == 3_000_000
    assert memory.steps_limit_bytes(share=1) == 1


def test_copies_get_what_steps_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_free_bytes", None)
    monkeypatch.setattr(memory, "_asked_bytes", None)
    monkeypatch.setattr(memory, "available_bytes", lambda: 4_000)
    assert memory.steps_limit_bytes() == 3_000
    assert memory.steps_limit_bytes(share=1) == 4_000
    with memory.kept_for_steps(1_000):
        assert memory.copies_limit_bytes() == 2_000
        with memory.kept_for_steps(None):
            assert memory.copies_limit_bytes() == 0
        assert memory.copies_limit_bytes() == 2_000
    with memory.kept_for_steps(1_000, copies_bytes=500):  # more are not worth it
        assert memory.copies_limit_bytes() == 500
        with memory.kept_for_steps(None):
            assert memory.copies_limit_bytes() == 0
        assert memory.copies_limit_bytes() == 500
    with memory.kept_for_steps(2_700, copies_bytes=500):
        assert memory.copies_limit_bytes() == 300
    assert memory.copies_limit_bytes() == 3_000
    memory.limit_memory(0)
    assert (memory.copies_limit_bytes(), memory.steps_limit_bytes()) == (0, 3_000)
    memory.limit_memory(1e-6)
    assert (memory.copies_limit_bytes(), memory.steps_limit_bytes()) == (1_000, 1_000)
    with memory.kept_for_steps(200, copies_bytes=500):  # who says what there is, gets it
        assert memory.copies_limit_bytes() == 800
