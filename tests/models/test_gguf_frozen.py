"""Models over the blocks of their .gguf file compute what the dequantised ones do, bit for bit."""

import pytest
import torch
from tests.support.gguf_files import SIZES, write_gguf
from tests.support.mapped import mapped_file
from torch import nn

from swlora.config import ModelSpec
from swlora.errors import UserError
from swlora.models import gguf_frozen
from swlora.models.gguf_blocks import StoredMatrix
from swlora.models.identity import weights_sample_sha256
from swlora.models.load import check_model, load_model
from swlora.models.quantised_weight import QuantisedWeight

TOKENS = torch.tensor([[72, 105, 33, 10, 200]])
KINDS = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


@pytest.fixture
def written(make_model, tiny_tokenizer, tmp_path):
    """A function (family, kind) -> a .gguf file of a tiny model."""

    def write(family, kind, **changes):
        path = tmp_path / f"{family}.{kind}.gguf"
        write_gguf(make_model(family, **SIZES[family] | changes), tiny_tokenizer, path, kind=kind)
        return path

    return write


def load(path, frozen, dtype="bfloat16"):
    return load_model(ModelSpec(name=str(path), frozen=frozen, dtype=dtype, device="cpu"))


def loss_and_gradient(model):
    """Return the loss of TOKENS and its gradient at what the embedding gives."""
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    loss = model(inputs_embeds=embedded, labels=TOKENS).loss
    return loss, *torch.autograd.grad(loss, embedded)


def check_same(path, dtype):
    kept, plain = load(path, "gguf", dtype).model, load(path, "dequantised", dtype).model
    assert not any(isinstance(p, QuantisedWeight) for p in plain.parameters())
    for a, b in zip(loss_and_gradient(kept), loss_and_gradient(plain), strict=True):
        assert torch.equal(a, b)
    assert weights_sample_sha256(kept) == weights_sample_sha256(plain)
    assert {n: (p.shape, p.dtype) for n, p in kept.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in plain.named_parameters()
    }
    for name, buffer in plain.named_buffers():
        assert torch.equal(kept.get_buffer(name), buffer), name
    assert kept.config.to_dict() == plain.config.to_dict()
    assert kept.name_or_path == plain.name_or_path
    return kept


@pytest.mark.parametrize("family", SIZES)
def test_every_family(family, written):
    model = check_same(written(family, "Q8_0"), "bfloat16")
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.ndim == 2:
            assert isinstance(module.weight, QuantisedWeight), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_type(kind, dtype, written):
    check_same(written("llama", kind, tie_word_embeddings=kind == "Q8_0"), dtype)


def test_a_file_in_the_wanted_dtype_is_used_where_it_lies(written):
    path = written("qwen2", "BF16")
    loaded = load(path, "gguf")
    weight = loaded.model.model.layers[1].mlp.up_proj.weight
    assert type(weight) is nn.Parameter
    assert mapped_file(weight.data_ptr()) == path
    assert f"{path}, its weights as they lie there (16 BF16)" in loaded.source
    quantised = load(written("qwen2", "Q8_0"), "gguf").model.lm_head.weight
    assert mapped_file(quantised.matrix.blocks.data_ptr()) == path.with_name("qwen2.Q8_0.gguf")


def test_what_is_kept_by_default(written, monkeypatch):
    path = written("llama", "Q4_K")
    assert not isinstance(load(path, None).model.lm_head.weight, QuantisedWeight)
    monkeypatch.setattr(gguf_frozen, "KEPT_ABOVE_BYTES", path.stat().st_size - 1)
    loaded = load(path, None)
    assert isinstance(loaded.model.lm_head.weight, QuantisedWeight)
    assert loaded.source == f"the GGUF file {path}, its weights as they lie there (16 Q4_K)"
    monkeypatch.setattr(gguf_frozen, "FAMILIES", {"gpt2"})
    assert not isinstance(load(path, None).model.lm_head.weight, QuantisedWeight)
    with pytest.raises(UserError, match=r"of llama models cannot stay .* --frozen dequantised"):
        load(path, "gguf")


def test_no_matrix_is_made_by_loading(written, monkeypatch):
    path = written("gemma3_text", "Q6_K")
    monkeypatch.setattr(StoredMatrix, "dense", lambda *_: pytest.fail("a matrix was dequantised"))
    loaded = load(path, "gguf")
    weights_sample_sha256(loaded.model)


def test_only_gguf_files_have_it(model_folder):
    spec = ModelSpec(name=str(model_folder("llama")), frozen="gguf", device="cpu")
    for use in (check_model, load_model):
        with pytest.raises(UserError, match=r"--frozen is about .gguf files"):
            use(spec)


def test_a_missing_weight(make_model, tiny_tokenizer, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    write_gguf(make_model("llama"), tiny_tokenizer, tmp_path / "hole.gguf", (name,))
    with pytest.raises(UserError, match=f"lacks 1 weight, such as {name}"):
        load(tmp_path / "hole.gguf", "gguf")
