"""GGUF files: the model comes back, and without weights its shapes and tokenizer."""

from pathlib import Path

import pytest
import torch
from tests.support.gguf_files import change_metadata, write_gguf
from transformers.utils import logging as transformers_logging

from swlora.config import ModelSpec
from swlora.errors import UserError
from swlora.models import builtin, load
from swlora.models.anatomy import n_embeddings
from swlora.models.load import load_model, load_skeleton

TOKENS = torch.tensor([[72, 105, 33, 10, 200]])


def spec(path: Path) -> ModelSpec:
    return ModelSpec(name=str(path), dtype="float32", device="cpu")


def test_a_gguf_file(make_model, tiny_tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)
    expected = make_model("llama", head_dim=6)
    write_gguf(expected, tiny_tokenizer, tmp_path / "model.gguf")
    loaded = load_model(spec(tmp_path / "model.gguf"))
    logits = expected(input_ids=TOKENS).logits
    torch.testing.assert_close(loaded.model(input_ids=TOKENS).logits, logits)
    left_out = ("model.layers.1.mlp.up_proj.weight",)
    write_gguf(expected, tiny_tokenizer, tmp_path / "hole.gguf", left_out)
    with pytest.raises(UserError, match=f"lacks 1 weight, such as {left_out[0]}"):
        load_model(spec(tmp_path / "hole.gguf"))
    assert loaded.source == f"the GGUF file {tmp_path / 'model.gguf'}"
    assert loaded.tokenizer.eos_token_id == 257
    builtin._convert(tmp_path / "model.gguf", tmp_path / "saved")
    assert capsys.readouterr() == ("", ""), "no bar of converting, loading or writing"
    again = load_model(spec(tmp_path / "saved"))
    torch.testing.assert_close(again.model(input_ids=TOKENS).logits, logits)


def test_its_shapes_and_tokenizer_are_read_without_its_weights(
    make_model, tiny_tokenizer, tmp_path, capsys, monkeypatch
):
    path = tmp_path / "model.gguf"
    write_gguf(make_model("llama", head_dim=6), tiny_tokenizer, path)
    loaded = load_model(spec(path))
    monkeypatch.setattr(load, "load_model", lambda *_, **__: pytest.fail("it was loaded"))
    found = load_skeleton(spec(path))
    shapes = {name: tensor.shape for name, tensor in loaded.model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in found.model.state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in found.model.state_dict().values())
    assert found.context_tokens == loaded.context_tokens
    assert n_embeddings(found.model) == n_embeddings(loaded.model)
    assert found.end_token_ids == loaded.end_token_ids
    assert found.source == loaded.source
    assert found.tokenizer("hi é").input_ids == loaded.tokenizer("hi é").input_ids
    assert capsys.readouterr() == ("", "")


def test_a_name_by_which_transformers_errs_is_refused(make_model, tiny_tokenizer, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(make_model("llama"), tiny_tokenizer, path)
    change_metadata(path, {"general.name": "mistral"})
    for read in (load_model, load_skeleton):
        with pytest.raises(UserError, match=r"has general.name = mistral.*--general-name Mistral"):
            read(spec(path))
    change_metadata(path, {"general.name": "Mistral"})
    assert load_model(spec(path)).model.config.model_type == "llama"


def test_a_file_whose_header_is_none(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(UserError, match="cannot be read as a GGUF language model") as refused:
        load_skeleton(spec(tmp_path / "model.gguf"))
    assert len(str(refused.value).splitlines()) == 1
