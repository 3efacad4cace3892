"""Rotary positions of .gguf files: every scaling that is read is transformers' own again."""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.support.gguf_models import GEMMA, LONG, YARN, export_tiny
from transformers import AutoConfig

from swlora.errors import UserError
from swlora.models.gguf_file import load_gguf
from swlora.models.gguf_header import read_gguf_table
from swlora.models.gguf_rope import LLAMA3, read_rope_scaling


def rope(theta: float = 10000.0, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": theta, **parameters}}


LLAMA_8, LLAMA_32 = (
    {**rope(5e5, **LLAMA3, factor=factor), "max_position_embeddings": 131072}
    for factor in (8.0, 32.0)
)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", LLAMA_8),
        ("llama", LLAMA_32),
        ("llama", rope(rope_type="linear", factor=2.5)),
        ("qwen2", rope(**YARN)),
        ("qwen3", rope(**YARN, beta_fast=16.0, beta_slow=2.0)),
        ("phi3", rope(**LONG, partial_rotary_factor=1.0)),
        ("gemma3_text", {"rope_parameters": GEMMA}),
        ("llama", rope(7e4)),
    ],
)
def test_a_file_is_read_with_the_positions_that_it_was_written_with(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model, token_ids = export_tiny(model_type, tmp_path, **changes)
    back, _ = load_gguf(tmp_path / "x.gguf")
    found, expected = (
        {name: b for name, b in m.named_buffers() if "inv_freq" in name} for m in (back, model)
    )
    assert found.keys() == expected.keys() and found
    for name, frequencies in expected.items():
        torch.testing.assert_close(found[name], frequencies, rtol=1e-6, atol=0)
    ids = torch.tensor([(token_ids * 8)[:200]])  # longer than some lengths before scaling
    logits = [m(ids).logits for m in (back, model)]
    torch.testing.assert_close(*logits, rtol=0, atol=2e-4)
    plain = AutoConfig.for_model(model_type).rope_parameters
    assert str(plain) != str(back.config.rope_parameters)


def factors_of_the_converter(factor: float, base: float, dim: int) -> list[float]:
    """Return the factors of Llama 3 as its paper's code has them, wavelength by wavelength."""
    made = []
    for i in range(dim // 2):
        wavelength = 2 * math.pi * base ** (2 * i / dim)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / factor + smooth)
        made.append(1.0 if wavelength < 2048 else factor if wavelength > 8192 else between)
    return made


def file_with(folder: Path, tensors: dict[str, list[float]], **facts: Any) -> Path:
    """Write a file of no weights that says `facts` of its rotary positions."""
    writer = gguf.GGUFWriter(folder / "r.gguf", "llama")
    for key, value in facts.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"llama.rope.{key.replace('__', '.')}", value)
    for name, values in tensors.items():
        writer.add_tensor(name, np.array(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "r.gguf"


def scaling(path: Path) -> dict[str, Any]:
    config = AutoConfig.for_model("llama", head_dim=64, **rope(5e5))
    return read_rope_scaling(path, read_gguf_table(path), config)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_is_known_by_its_factors(factor: float, tmp_path: Path) -> None:
    factors = factors_of_the_converter(factor, 5e5, 64)
    assert len(set(factors)) > 3  # some lie between 1 and the factor
    found = scaling(file_with(tmp_path, {"rope_freqs.weight": factors}))
    assert found == {**LLAMA3, "factor": factor}
    factors[20] *= 1.001
    with pytest.raises(UserError, match=r"scales its rotary.*\(rope_freqs\.weight\)"):
        scaling(file_with(tmp_path, {"rope_freqs.weight": factors}))


@pytest.mark.parametrize(
    ("tensors", "facts", "named"),
    [
        ({}, {"scaling__type": "linear"}, "linear scaling"),
        ({}, {"scaling__type": "yarn", "scaling__factor": 4.0}, "yarn scaling"),
        ({}, {"scaling__type": "su", "scaling__factor": 4.0}, "su scaling"),
        ({"rope_freqs.weight": [1.0, 4.0]}, {}, "rope_freqs.weight"),
        ({"rope_factors_long.weight": [1.0]}, {}, "rope_factors_long.weight"),
        ({"rope_freqs.weight": [1.0]}, {"scaling__type": "linear"}, "linear scaling"),
    ],
)
def test_another_scaling_is_refused(
    tensors: dict[str, list[float]], facts: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"scales its rotary frequencies.*\({named}\)"):
        scaling(file_with(tmp_path, tensors, **facts))


def test_a_factor_without_a_type_is_linear_as_in_llama_cpp(tmp_path: Path) -> None:
    for key in ("scaling__factor", "scale_linear"):
        path = file_with(tmp_path, {}, **{key: 4.0})
        assert scaling(path) == {"rope_type": "linear", "factor": 4.0}
    assert scaling(file_with(tmp_path, {}, scaling__type="none")) == {}


def test_that_it_was_trained_so_is_no_other_scaling(tmp_path: Path) -> None:
    said = {"scaling__type": "linear", "scaling__factor": 4.0, "scaling__finetuned": 1.0}
    assert scaling(file_with(tmp_path, {}, **said)) == {"rope_type": "linear", "factor": 4.0}
    yarn = {**said, "scaling__type": "yarn", "scaling__original_context_length": 64}
    assert scaling(file_with(tmp_path, {}, **yarn))["rope_type"] == "yarn"
