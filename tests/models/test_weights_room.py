"""Weights that are more than memory holds are refused before they are read, with what would fit."""

import json
import re
import shutil
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.control_groups import lay_groups

from swlora import memory
from swlora.errors import UserError
from swlora.models import load, weights_room
from swlora.models.weights_room import GGUF_BYTES, check_weights_fit

BILLION = 1_000_000_000


@pytest.fixture
def free(monkeypatch):
    def make(n_bytes: int) -> None:
        monkeypatch.setattr(weights_room, "available_bytes", lambda: n_bytes)
        monkeypatch.setattr(weights_room, "free_swap_bytes", lambda: 0)

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


def test_swap_that_the_container_may_not_use_is_no_room(free, tmp_path, monkeypatch) -> None:
    free(BILLION)
    monkeypatch.setattr(weights_room, "free_swap_bytes", memory.free_swap_bytes)
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=8 * BILLION))
    lay_groups(monkeypatch, tmp_path, "", {})
    check_weights_fit("m", 4 * BILLION, torch.bfloat16)
    limits = {"memory.swap.max": "0", "memory.swap.current": "0"}
    lay_groups(monkeypatch, tmp_path, "", limits)
    with pytest.raises(UserError, match=r"1\.0 GB of memory are free"):
        check_weights_fit("m", 4 * BILLION, torch.bfloat16)


def test_quantised_weights_are_as_large_as_their_files(free) -> None:
    free(3 * BILLION)
    check_weights_fit("m", 7 * BILLION, torch.float32, 2 * BILLION)
    said = r"take 4\.0 GB as they lie in their files, and 3\.0 GB .* what would fit: Q4_K"
    with pytest.raises(UserError, match=said):
        check_weights_fit("m", 5 * BILLION, torch.float32, 4 * BILLION)


@pytest.mark.parametrize(
    ("kind", "stays"),
    [("bitnet", True), ("gptq", True), ("fp8", False), ("of_somebody", False)],
)
def test_a_quantised_folder_takes_what_it_takes_when_it_is_loaded(
    kind, stays, free, model_folder, tmp_path, monkeypatch
) -> None:
    """bitnet stays as it is; fp8 is made whole without a GPU; a kind without its package stops."""
    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    packing = {"quantization_config": {"quant_method": kind, "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config | packing))
    weights = load_file(folder / "model.safetensors")
    packed = {name: w.flatten()[: w.numel() // 4].clone() for name, w in weights.items()}
    save_file(packed, folder / "model.safetensors")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loads = pytest.fail if not stays else Loading.begin
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loads)
    free((folder / "model.safetensors").stat().st_size)
    expected = "cannot be loaded: it is loaded now" if stays else r"in float32, and .* are free"
    with pytest.raises(UserError, match=expected):
        load.load_model(load.ModelSpec(name=str(folder), device="cpu", dtype="float32"))


class Loading:
    @staticmethod
    def begin(*_given: object, **_settings: object) -> None:
        raise OSError("it is loaded now")


@pytest.mark.parametrize("free_bytes", [3_000, None])
def test_a_device_without_room_is_named_with_what_helps(free_bytes, model_folder, monkeypatch):
    """None: not even what is free there can be asked for."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def asked(_device: object) -> tuple[int, int]:
        return (free_bytes, 1 << 30) if free_bytes else fail()

    folder = str(model_folder("llama"))
    monkeypatch.setattr(load, "resolve_device", lambda _name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", asked)
    monkeypatch.setattr("transformers.LlamaForCausalLM.to", fail)
    with pytest.raises(UserError) as refused:
        load.load_model(load.ModelSpec(name=folder, dtype="float32"))
    there = "cuda, and 3.0 KB are free there; " if free_bytes else "cuda; "
    assert re.fullmatch(
        rf"the weights of .* take \d+ KB and find no room on {there}give --device cpu or "
        "--dtype bfloat16, or see to it that other programs leave it more",
        str(refused.value),
    )


def test_a_folder_is_refused_before_it_is_read(free, model_folder, monkeypatch) -> None:
    free(1000)
    folder = str(model_folder("llama"))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    with pytest.raises(UserError, match=r"in float32, and 1\.0 KB of memory are free"):
        load.load_model(load.ModelSpec(name=folder, device="cpu", dtype="float32"))
