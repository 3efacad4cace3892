"""The fast forwards in a model of somebody else's loop: the same outputs, and all undone after."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tests.support.adapters import fill_b
from tests.support.collated import (
    LAYOUTS,
    assert_same_gradients,
    gradients,
    labelled,
    packed,
    padded,
    plain_loss,
)
from tests.support.models import MakeModel, add_to_loss
from tests.support.sequences import branching
from tests.training.test_exactness import SHAPES, adapted

from swlora import patch, tree_loss
from swlora.adapters.methods import trainable_parameters
from swlora.errors import UserError
from swlora.kernels.linear import packed_weight

BATCH = padded(labelled(branching()), "right")


def own_forwards(model: Any) -> dict[str, Any]:
    return {name: vars(m).get("forward") for name, m in model.named_modules()}


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(vars(module).get("dropout"), float):
            module.dropout = 0.0
    return model


@pytest.mark.parametrize("shape", [*SHAPES, "falcon"])
def test_losses_gradients_and_logits(
    make_model: MakeModel, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES, "falcon", ("falcon", {}))
    peft_model = without_dropout(adapted(make_model, shape))
    loss = plain_loss(peft_model, BATCH)
    expected = gradients(peft_model, loss)
    with torch.no_grad():
        logits = peft_model(**BATCH, use_cache=False).logits
    with patch(peft_model) as patched:
        assert patched.replaced["adapters"] > 0
        with torch.no_grad():
            found = peft_model(**BATCH, use_cache=False).logits
        seen = BATCH["attention_mask"] == 1
        torch.testing.assert_close(found[seen], logits[seen], rtol=1e-5, atol=1e-5)
        for mode in (False, True):
            out = peft_model.train(mode)(**BATCH, use_cache=False)
            assert float(out.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
            assert_same_gradients(gradients(peft_model, out.loss), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n_items", [None, 17, torch.tensor(17)])
def test_loss_in_training_without_logits(model: Any, layout: str, n_items: Any) -> None:
    batch = LAYOUTS[layout](labelled(branching()))
    more = {} if n_items is None else {"num_items_in_batch": n_items}
    loss = plain_loss(model, batch, **more)
    expected = gradients(model, loss)
    with patch(model.train()):
        out = model(**batch, **more, use_cache=False)
        assert out.logits is None and list(out) == ["loss"]
        assert float(out.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
        assert_same_gradients(gradients(model, out.loss), expected)
        assert model(**BATCH, output_hidden_states=True).logits is not None


def test_copies_of_the_head_last_as_long_as_the_patch(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    laid_out = []
    own = packed_weight.laid_out
    monkeypatch.setattr(packed_weight, "laid_out", lambda w: laid_out.append(w.shape) or own(w))
    n_vocab, width = model.get_output_embeddings().weight.shape
    with patch(model):
        for _ in range(2):
            model.train()(**BATCH, use_cache=False).loss.backward()
    of_head = [shape for shape in laid_out if set(shape) == {n_vocab, width}]
    assert 0 < len(of_head) <= 2  # one for each direction


def test_everything_is_undone(model: Any) -> None:
    model.get_base_model().lm_head.forward = own = model.get_base_model().lm_head.forward
    before = own_forwards(model)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        logits = model(**BATCH).logits
    patched = patch(model)
    assert own_forwards(model) != before
    assert patched.replaced == {
        "adapters": 21, "norms": 7, "gated MLPs": 3, "frozen maps": 21, "head": 1,
        "loss of the head": 1,
    }  # fmt: skip
    model(**BATCH).loss.backward()
    patched.undo()
    patched.undo()
    assert own_forwards(model) == before
    assert vars(model.get_base_model().lm_head)["forward"] is own
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(model(**BATCH).logits, logits)
    with pytest.raises(RuntimeError, match="stop"), patch(model):
        raise RuntimeError("stop")
    assert own_forwards(model) == before


def test_what_others_have_wrapped_stays(model: Any) -> None:
    """Such as TRL does it to a model of its trainer."""
    base = model.get_base_model()
    expected = plain_loss(model, BATCH)
    patched = patch(model)
    inner = base.forward
    base.forward = outer = lambda *args, **kwargs: inner(*args, **kwargs)
    patched.undo()
    assert vars(base)["forward"] is outer
    output = model.train()(**BATCH, use_cache=False)
    assert output.logits is not None and torch.equal(output.loss, expected)
    with patch(model):
        assert model(**BATCH, use_cache=False).logits is None
    assert vars(base)["forward"] is outer


def test_it_follows_the_adapter(model: Any) -> None:
    """Between steps, and where the adapter is switched off, merged, or another one."""

    def assert_same() -> torch.Tensor:
        with torch.no_grad():
            found = model(**BATCH).logits
            patched.undo()
            expected = model(**BATCH).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        return expected

    patched = patch(model)
    with torch.no_grad():
        model(**BATCH)
        for parameter in trainable_parameters(model).values():
            parameter.mul_(1.5)
    assert_same()
    patched = patch(model)
    with torch.no_grad():
        model(**BATCH)
    with model.disable_adapter():
        off = assert_same()
    patched = patch(model)
    model.merge_adapter()
    merged = assert_same()
    assert not torch.allclose(merged, off, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    patched = patch(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter("second")
    fill_b(model)
    assert_same()


def test_trees_of_a_patched_model(model: Any) -> None:
    loss = plain_loss(model, BATCH)
    expected = gradients(model, loss)
    with patch(model):
        found = tree_loss(model, **BATCH)
        assert float(found.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert_same_gradients(gradients(model, found), expected)


def test_copies_are_not_patched(model: Any) -> None:
    with patch(model):
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(1.5)
        found = gradients(copied, plain_loss(copied, BATCH))
        with patch(copied):
            assert_same_gradients(gradients(copied, plain_loss(copied, BATCH)), found)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert_same_gradients(found, gradients(model, plain_loss(model, BATCH)))


@pytest.mark.parametrize("shape", ["gpt2", "llama, grouped heads, own head"])
def test_second_derivatives_are_refused(make_model: MakeModel, shape: str) -> None:
    """They would be wrong: torch takes what a backward has saved for constants."""
    peft_model = without_dropout(adapted(make_model, shape))
    parameters = list(trainable_parameters(peft_model).values())

    def refused(loss: torch.Tensor) -> None:
        with pytest.raises(UserError, match="first derivatives alone"):
            torch.autograd.grad(loss, parameters, create_graph=True)

    refused(tree_loss(peft_model, **BATCH))
    with patch(peft_model):
        refused(plain_loss(peft_model, BATCH))


HOOKED = ("self_attn.q_proj.lora_A.default", "self_attn.q_proj.base_layer", "mlp.act_fn")


@pytest.mark.parametrize("name", [*(f"model.layers.1.{name}" for name in HOOKED), "lm_head"])
def test_hooks_run(model: Any, name: str) -> None:
    """Added before or later: a module of which a part has hooks computes as it did."""
    module, batch = model.train().get_base_model().get_submodule(name), BATCH | {"use_cache": False}
    with patch(model):
        before = float(model(**batch).loss.detach())
        module.register_forward_hook(lambda _m, _x, out: 2 * out)
        later = model(**batch).loss
    loss = model(**batch).loss
    assert float(loss.detach()) != pytest.approx(before, rel=1e-5)
    expected = gradients(model, loss)
    with patch(model):
        for found in (later, model(**batch).loss):
            assert float(found.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
            assert_same_gradients(gradients(model, found), expected)


def test_generation(model: Any) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 257}
    expected = model.generate(ids, **settings)
    with patch(model):
        assert torch.equal(model.generate(ids, **settings), expected)


def test_a_forward_that_adds_to_the_loss_runs(model: Any) -> None:
    add_to_loss(model.get_base_model())
    loss = plain_loss(model, BATCH)
    with patch(model.train()) as patched:
        found = model(**BATCH, use_cache=False).loss
    assert "loss of the head" not in patched.replaced and patched.replaced["adapters"] > 0
    assert float(found.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)


def test_weights_that_begin_to_be_trained(model: Any) -> None:
    norm = model.get_base_model().model.layers[2].input_layernorm
    patched = patch(model)
    norm.requires_grad_(True)
    found = gradients(model, plain_loss(model, BATCH))
    patched.undo()
    assert_same_gradients(found, gradients(model, plain_loss(model, BATCH)))


def test_autocast(model: Any) -> None:
    message = "autocast to bfloat16 is on and the weights are float32"
    with patch(model), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(UserError, match=message):
            model(**BATCH)
        model.get_base_model().to(torch.bfloat16)
        assert torch.isfinite(model(**packed(labelled(branching()))).loss)


def test_what_is_refused(make_model: MakeModel, model: Any) -> None:
    with patch(model), pytest.raises(UserError, match="patched already; undo that first"):
        patch(model)
    with pytest.raises(UserError, match="nothing in this gpt2 model has a fast forward"):
        patch(make_model("gpt2").requires_grad_(True))
    unknown = make_model("llama")
    unknown.config.model_type = "unheard_of"
    with pytest.raises(UserError, match="unheard_of"):
        patch(unknown)
    with pytest.raises(UserError, match="not a Linear"):
        patch(torch.nn.Linear(2, 2))
