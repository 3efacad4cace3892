"""Merging: the dtypes of a base's weights, and what lies beside them that is no weight."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.deploy.test_merge import adapter_of, merged_from, refusal, spec_of
from tests.support.gguf_models import add_old_buffers

from swlora.adapters.merged_weights import MergedWeights
from swlora.deploy import merged_folder
from swlora.deploy.merge import TOLERANCE_NATS
from swlora.models.load import load_model


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_buffers_that_nothing_reads_are_not_merged(model_folder, tmp_path, dtype):
    base = Path(shutil.copytree(model_folder("gpt_neox"), tmp_path / "base"))
    names = set(load_file(base / "model.safetensors"))
    add_old_buffers(base)
    merged_from(base, adapter_of(base, tmp_path / "a"), tmp_path / "m", dtype=dtype)
    assert set(load_file(tmp_path / "m" / "model.safetensors")) == names


def test_only_what_is_rounded_must_fit_into_float16(model_folder, tmp_path):
    base = Path(shutil.copytree(model_folder("llama"), tmp_path / "base"))
    adapter = adapter_of(base, tmp_path / "a")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    said = refusal(base, adapter, tmp_path / "m", force=True, dtype="float16")
    assert "model.norm.weight holds numbers too large" in said
    own = torch.tensor([float("-inf")]).half()  # as it is in the file, it goes into the other
    merging = MergedWeights(adapter, load_model(spec_of(base)).model)
    assert merged_folder._written("model.norm.weight", own, merging, None) is own


@pytest.mark.parametrize(
    ("asked", "written", "wide"),
    [(None, "bfloat16", torch.float32), ("float16", "float16", torch.float16)],
)
def test_a_base_of_several_dtypes_is_rounded_by_those_that_change(
    model_folder, tmp_path, asked, written, wide
):
    base = Path(shutil.copytree(model_folder("llama"), tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors = {n: t if n == "model.norm.weight" else t.bfloat16() for n, t in tensors.items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    merged = merged_from(base, adapter_of(base, tmp_path / "a"), tmp_path / "m", dtype=asked)
    assert merged.dtype == written
    assert merged.tolerance_kl_nats_per_token == TOLERANCE_NATS[written]
    assert merged.kl_nats_per_token > TOLERANCE_NATS["float32"]
    found = load_file(tmp_path / "m" / "model.safetensors")
    assert found["model.layers.0.mlp.up_proj.weight"].dtype == getattr(torch, written)
    assert found["model.norm.weight"].dtype == wide
