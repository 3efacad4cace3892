"""Weights of a .gguf file one at a time: bit for bit those of transformers' whole model."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.gguf_files import SIZES, write_gguf
from transformers import AutoModelForCausalLM, GgufConfig

from swlora.errors import UserError
from swlora.models.gguf_header import read_gguf_table
from swlora.models.gguf_weights import GgufWeights

KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


def by_transformers(path: Path):
    return AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


@pytest.mark.parametrize("family", SIZES)
def test_every_weight_has_the_bits_that_transformers_gives_it(
    family, make_model, tiny_tokenizer, tmp_path
):
    path = tmp_path / "model.gguf"
    write_gguf(make_model(family, **SIZES[family]), tiny_tokenizer, path, kind="Q8_0")
    expected, weights = by_transformers(path), GgufWeights(path)
    assert set(weights.names) == {name for name, _ in expected.named_parameters()}
    for name in weights.names:
        tensor = weights.tensor(name)
        assert tensor.dtype == torch.float32
        assert weights.shape(name) == tuple(tensor.shape)
        assert torch.equal(bits(tensor), bits(expected.get_parameter(name))), name
    assert weights.shards() == [weights.names]


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_of_storage(kind, make_model, tiny_tokenizer, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(make_model("llama", **SIZES["llama"]), tiny_tokenizer, path, kind=kind)
    expected, weights = by_transformers(path), GgufWeights(path)
    for name in weights.names:
        assert torch.equal(bits(weights.tensor(name)), bits(expected.get_parameter(name))), name


@pytest.mark.parametrize("family", sorted(SIZES.keys() - {"phi3"}))
def test_the_rows_of_a_weight_in_the_file(family, make_model, tiny_tokenizer, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(make_model(family, **SIZES[family]), tiny_tokenizer, path)
    weights = GgufWeights(path)
    for name in weights.names:
        order, stored = weights.row_order(name), weights.stored(name)
        tensor = weights.tensor(name).numpy()
        is_transposed = family == "gpt2" and (".c_" in name) and tensor.ndim == 2
        assert (order is None) == (tensor.ndim < 2 or is_transposed), name
        if order is not None:
            assert np.array_equal(weights.blocks(stored)[order], tensor), name
            assert (order != np.arange(len(order))).any() == (
                family == "llama" and ("q_proj" in name or "k_proj" in name)
            )


@pytest.fixture
def file(make_model, tiny_tokenizer, tmp_path) -> Path:
    write_gguf(make_model("llama"), tiny_tokenizer, tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def refusal(path: Path) -> str:
    with pytest.raises(UserError, match="cannot be read as a GGUF language model") as refused:
        read_gguf_table(path)
    assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(UserError):
        GgufWeights(path)
    return str(refused.value)


def test_a_file_that_is_cut_off_anywhere(file):
    whole = file.read_bytes()
    for n_bytes in (0, 3, 10, 30, 1000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:n_bytes])
        said = refusal(file)
    assert f"ends at byte {len(whole):,}, and the file has {len(whole) - 1:,}" in said


def test_counts_that_cannot_be(file):
    whole = file.read_bytes()
    for at, name in ((8, "tensors"), (16, "metadata")):
        for n in (1 << 60, (1 << 64) - 1, 5000):
            file.write_bytes(whole[:at] + struct.pack("<Q", n) + whole[at + 8 :])
            assert refusal(file), name
    first = whole.index(b"tokenizer.ggml.scores") + len("tokenizer.ggml.scores") + 8
    for n in (1 << 60, (1 << 64) - 1):
        file.write_bytes(whole[:first] + struct.pack("<Q", n) + whole[first + 8 :])
        assert "cut off" in refusal(file)


def test_tensors_that_cannot_be_read(file):
    whole = file.read_bytes()
    at = whole.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight")  # dims, 2 sizes, type

    def changed(place: int, layout: str, value: int) -> str:
        data = bytearray(whole)
        struct.pack_into(layout, data, at + place, value)
        file.write_bytes(data)
        return refusal(file)

    assert "blk.0.attn_q.weight is quantised in an unknown way" in changed(20, "<I", 4711)
    assert "stored as Q8_1, which cannot be dequantised" in changed(20, "<I", 9)
    assert "which Q8_0 cannot have" in changed(20, "<I", 8)
    assert "has 99 dimensions" in changed(0, "<I", 99)
    assert "cut off" in changed(4, "<Q", 1 << 62)
    assert "cut off" in changed(24, "<Q", 1 << 63)


def test_other_files(file):
    whole = file.read_bytes()
    file.write_bytes(b"GGUX" + whole[4:])
    assert "does not begin as one" in refusal(file)
    for version, said in ((1, "version 1"), (1 << 24, "other order of bytes")):
        file.write_bytes(whole[:4] + struct.pack("<I", version) + whole[8:])
        assert said in refusal(file)
    file.write_bytes(whole.replace(b"general.architecture", b"general.architecturX"))
    assert "names no architecture" in refusal(file)


def test_a_weight_of_another_shape_than_the_model_has(make_model, tiny_tokenizer, file):
    whole = file.read_bytes()
    at = whole.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4
    rows, columns = struct.unpack_from("<QQ", whole, at)
    data = bytearray(whole)
    struct.pack_into("<QQ", data, at, columns, rows)
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"mlp.up_proj.weight has the shape \(24, 40\)"):
        GgufWeights(file).tensor("model.layers.0.mlp.up_proj.weight")
