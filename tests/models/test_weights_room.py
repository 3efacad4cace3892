"""Weights that are more than memory holds are refused before they are read, with what would fit."""

import re
from types import SimpleNamespace

import psutil
import pytest
import torch

from swlora.errors import UserError
from swlora.models import load, weights_room
from swlora.models.weights_room import GGUF_BYTES, check_weights_fit

BILLION = 1_000_000_000


@pytest.fixture
def free(monkeypatch):
    def make(n_bytes: int) -> None:
        monkeypatch.setattr(weights_room, "available_bytes", lambda: n_bytes)
        monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=0))

    return make


def test_what_would_fit_is_named(free) -> None:
    free(8 * BILLION)
    check_weights_fit("m", 4 * BILLION, torch.bfloat16)
    with pytest.raises(UserError) as refusal:
        check_weights_fit("m", 7 * BILLION, torch.bfloat16)
    said = str(refusal.value)
    assert "the weights of m take 14 GB in bfloat16, and 8.0 GB of memory are free" in said
    named = dict(re.findall(r"(Q\d_\w+) in a .gguf file \(([\d.]+) GB\)", said))
    assert named.keys() == {"Q8_0", "Q4_K"}
    for kind, n_gb in named.items():
        assert float(n_gb) == pytest.approx(7 * GGUF_BYTES[kind], abs=0.1)
        assert float(n_gb) < 8
    with pytest.raises(UserError, match=r"--dtype bfloat16 \(6.0 GB\) or Q8_0"):
        check_weights_fit("m", 3 * BILLION, torch.float32)
    with pytest.raises(UserError, match="not even 4 bits a weight would fit"):
        check_weights_fit("m", 70 * BILLION, torch.bfloat16)


def test_a_folder_is_refused_before_it_is_read(free, model_folder, monkeypatch) -> None:
    free(1000)
    folder = str(model_folder("llama"))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    with pytest.raises(UserError, match=r"in float32, and 1\.0 KB of memory are free"):
        load.load_model(load.ModelSpec(name=folder, device="cpu", dtype="float32"))
