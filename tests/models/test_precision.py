"""Devices and precisions: what is asked for is given, or refused where it is not there."""

import sys
from pathlib import Path

import pytest
import torch

from swlora.errors import UserError
from swlora.models.precision import bfloat16_is_fast, resolve_device, resolve_dtype

INTEL = {
    "architecture": "x86_64",
    "cpu_name": "Intel Xeon",
    "avx512_bf16": True,
    "avx512_fp16": True,
}


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "x86_64", "avx512_f": True, "bf16": True}, False),
        ({**INTEL, "amx_bf16": True}, True),
        ({**INTEL, "amx_bf16": False}, False),  # hidden from a virtual machine: at half the rate
        ({**INTEL, "amx_bf16": False, "avx512_fp16": False}, True),
        ({**INTEL, "amx_bf16": False, "cpu_name": "AMD EPYC"}, True),
        ({"architecture": "arm64", "bf16": True}, sys.platform == "linux"),
        ({"architecture": "arm64", "neon": True}, False),
    ],
)
def test_auto_is_bfloat16_where_the_processor_has_it(flags, native, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert bfloat16_is_fast("cpu") is native
    assert resolve_dtype("auto", "cpu") == (torch.bfloat16 if native else torch.float32)


def test_auto_asks_the_gpu_that_is_named(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: {"cuda:1": (7, 5)}.get(device, (9, 0))
    )
    assert resolve_dtype("auto", "cuda:0") == torch.bfloat16
    assert resolve_dtype("auto", "cuda:1") == torch.float32


def test_the_processor_is_asked_in_older_torch_too(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert not bfloat16_is_fast("cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert bfloat16_is_fast("cpu")


def test_this_processor_says_what_it_has():
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or torch.cpu.get_capabilities()["architecture"] != "x86_64":
        pytest.skip("no /proc/cpuinfo of an x86 processor")
    flags = cpuinfo.read_text().split()
    is_slow = "GenuineIntel" in flags and "avx512_fp16" in flags and "amx_bf16" not in flags
    has_bfloat16 = "avx512_bf16" in flags or "amx_bf16" in flags
    assert bfloat16_is_fast("cpu") is (has_bfloat16 and not is_slow)


def test_named_dtypes_are_taken_as_they_are():
    assert resolve_dtype("float32", "cuda") == torch.float32
    assert resolve_dtype("bfloat16", "cpu") == torch.bfloat16


@pytest.mark.parametrize(
    ("n_cuda", "has_mps", "expected"),
    [(0, False, "cpu"), (2, False, "cuda"), (0, True, "cpu"), (1, True, "cuda")],
)
def test_devices(n_cuda, has_mps, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_cuda > 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    assert resolve_device("auto").type == expected
    assert resolve_device("cpu") == torch.device("cpu")
    there = ["cpu", *["cuda", "cuda:0", "cuda:1"][: n_cuda + (n_cuda > 0)]]
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        if name in there:
            assert resolve_device(name) == torch.device(name)
        else:
            kind = name.split(":")[0]
            with pytest.raises(UserError, match=f"this machine has [012] {kind} devices?;"):
                resolve_device(name)
