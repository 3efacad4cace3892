"""Devices and precisions: what is asked for is given, or refused where it is not there."""

import pytest
import torch

from swlora.errors import UserError
from swlora.models import precision
from swlora.models.precision import bfloat16_is_native, resolve_device, resolve_dtype


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_bfloat16_where_it_is_fast(native, monkeypatch):
    times = {torch.bfloat16: 1.0 if native else 40.0, torch.float32: 2.0}
    monkeypatch.setattr(precision, "_product_s", lambda dtype: times[dtype])
    bfloat16_is_native.cache_clear()
    assert bfloat16_is_native("cpu") is native
    assert resolve_dtype("auto", "cpu") == (torch.bfloat16 if native else torch.float32)
    assert resolve_dtype("auto", "mps") == torch.float32
    bfloat16_is_native.cache_clear()


def test_named_dtypes_are_taken_as_they_are():
    assert resolve_dtype("float32", "cuda") == torch.float32
    assert resolve_dtype("bfloat16", "cpu") == torch.bfloat16


@pytest.mark.parametrize(
    ("n_cuda", "has_mps", "expected"),
    [(0, False, "cpu"), (2, False, "cuda"), (0, True, "mps"), (1, True, "cuda")],
)
def test_devices(n_cuda, has_mps, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_cuda > 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    assert resolve_device("auto").type == expected
    assert resolve_device("cpu") == torch.device("cpu")
    there = ["cpu", *["cuda", "cuda:0", "cuda:1"][: n_cuda + (n_cuda > 0)], *["mps"] * has_mps]
    for name in ("cpu", "cuda", "cuda:0", "cuda:1", "mps"):
        if name in there:
            assert resolve_device(name) == torch.device(name)
        else:
            kind = name.split(":")[0]
            with pytest.raises(UserError, match=f"this machine has [012] {kind} devices"):
                resolve_device(name)
