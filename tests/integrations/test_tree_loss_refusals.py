"""What tree_loss refuses in a line: batches and models whose loss trees would not reproduce."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from tests.integrations.test_tree_loss import ROWS, assert_same
from tests.support.adapters import attach
from tests.support.collated import IGNORED, LAYOUTS, Batch, padded
from tests.support.models import MakeModel, add_to_loss
from torch import distributed

from swlora import tree_loss
from swlora.adapters.methods import train_mode
from swlora.config import AdapterSpec
from swlora.errors import UserError


def _without(name: str) -> Callable[[Batch], Batch]:
    return lambda batch: {key: value for key, value in batch.items() if key != name}


def _set(name: str, place: Any, value: int) -> Callable[[Batch], Batch]:
    def change(batch: Batch) -> Batch:
        tensor = batch[name].clone()
        tensor[place] = value
        return batch | {name: tensor}

    return change


BAD_BATCHES: dict[str, tuple[str, Callable[[Batch], Batch], str]] = {
    "hole in the mask": ("right", _set("attention_mask", (0, 1), 0), "middle of a row"),
    "other values": ("right", _set("attention_mask", (0, 1), 2), "other values than 0 and 1"),
    "mask of four dimensions": (
        "right",
        lambda b: b | {"attention_mask": b["attention_mask"][:, None, None]},
        "attention_mask of shape",
    ),
    "label on padding": ("right", _set("labels", (0, -1), 11), "label on padding"),
    "label on a first token": ("packed", _set("labels", (0, 0), 5), ""),
    "label behind a border": (
        "packed",
        lambda b: b | {"labels": torch.where(b["position_ids"] == 0, b["input_ids"], b["labels"])},
        "first token of a row",
    ),
    "label behind left padding": (
        "left",
        lambda b: b | {"labels": torch.where(b["attention_mask"] == 1, b["input_ids"], IGNORED)},
        "first token of a row",
    ),
    "labels of one's own": (
        "right",
        lambda b: b | {"labels": torch.where(b["labels"] == IGNORED, IGNORED, b["labels"] + 1)},
        "other tokens than input_ids",
    ),
    "packed beside a mask": (
        "packed",
        lambda b: b | {"attention_mask": torch.ones_like(b["input_ids"])},
        "leave the mask out",
    ),
    "packed without positions": ("packed", _without("position_ids"), "without position_ids"),
    "labels of another shape": ("right", lambda b: b | {"labels": b["labels"][:, 1:]}, "of shape"),
    "no integers": ("right", lambda b: b | {"labels": b["labels"].float()}, "integers"),
    "token types": (
        "right",
        lambda b: b | {"token_type_ids": b["input_ids"]},
        "token_type_ids cannot be given",
    ),
    "weights": ("right", lambda b: b | {"loss_weights": b["input_ids"]}, "loss_weights cannot"),
}


@pytest.mark.parametrize("bad", BAD_BATCHES)
def test_batches_that_are_refused(model: Any, bad: str) -> None:
    layout, change, message = BAD_BATCHES[bad]
    batch = change(LAYOUTS[layout](ROWS))
    if not message:  # nothing predicts the first token of all, and transformers passes it over
        assert_same(model, batch)
        return
    with pytest.raises(UserError, match=message) as raised:
        tree_loss(model, **batch)
    assert "\n" not in str(raised.value)


def _with_dropout(model: Any) -> Any:
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1)
    return get_peft_model(model, config).train()


def _with_head(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))


def _with_embeddings(model: Any) -> Any:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    return get_peft_model(model, config)


def _checkpointing(model: Any) -> Any:
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()
    return model


def _own_loss(model: Any) -> Any:
    model.loss_function = lambda **_: torch.zeros(())
    return model


def _decorated(model: Any) -> Any:
    """Give a model a class whose forward says that it is the one it decorates."""
    own = type(model).forward
    forward = functools.wraps(own)(lambda *args, **kwargs: own(*args, **kwargs))
    model.__class__ = type("Decorated", (type(model),), {"forward": forward})
    return model


def _with_regulariser(model: Any) -> Any:
    schedule = {"total_step": 10, "tinit": 1, "tfinal": 5}
    config = AdaLoraConfig(init_r=4, target_r=2, target_modules=["q_proj"], **schedule)
    return get_peft_model(model, config)


def _noisy(model: Any) -> Any:
    model.get_input_embeddings().neftune_noise_alpha = 5.0
    return model.train()


def _hooked(name: str) -> Callable[[Any], Any]:
    def hook(model: Any) -> Any:
        config = LoraConfig(r=2, target_modules=["q_proj"])
        peft_model = get_peft_model(model, config).eval()
        peft_model.get_submodule(name).register_forward_hook(lambda _m, _x, out: out)
        return peft_model

    return hook


def _replicated(model: Any) -> Any:
    config = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 3]])
    return get_peft_model(model, config)


BLOCK = "base_model.model.model.layers.1"
BAD_MODELS: dict[str, tuple[str, dict[str, Any], Callable[[Any], Any], str]] = {
    "falcon": ("falcon", {}, lambda m: m, "falcon models cannot run"),
    "dropout of the adapter": ("llama", {}, _with_dropout, "lora_dropout.default drops at random"),
    "dropout of the model": ("gpt2", {"resid_pdrop": 0.1}, lambda m: m.train(), "drops at random"),
    "dropout as a number": ("opt", {"dropout": 0.2}, lambda m: m.train(), "drops at random"),
    "trained head": ("llama", {"tie_word_embeddings": False}, _with_head, "lm_head.*is trained"),
    "trained embeddings": ("llama", {}, _with_embeddings, "embed_tokens.*is trained"),
    "everything trained": ("llama", {}, lambda m: m.requires_grad_(True), "embed_tokens.*trained"),
    "checkpointing": ("llama", {}, _checkpointing, "gradient checkpointing is on"),
    "a loss of its own": ("llama", {}, _own_loss, "loss function of its own"),
    "a forward of its own": ("llama", {}, add_to_loss, "the model has a forward of its own"),
    "a decorated forward": ("llama", {}, _decorated, "the model has a forward of its own"),
    "a regulariser of PEFT's": ("llama", {}, _with_regulariser, "AdaLoraModel has a forward"),
    "noise of the routers": (
        "mixtral",
        {"router_jitter_noise": 0.1},
        lambda m: m.train(),
        "drops at random",
    ),
    "routers' loss": ("mixtral", {"output_router_logits": True}, lambda m: m, "routers"),
    "noise": ("llama", {}, _noisy, "NEFTune"),
    "prompt learning": (
        "llama",
        {},
        lambda m: get_peft_model(m, _prompt_config()),
        "depends on where a token stands",
    ),
    "replicated blocks": ("llama", {}, _replicated, "a block has a configuration of its own"),
    "hook of all": ("llama", {}, _hooked(""), "the model has hooks, and trees do not call it"),
    "hook of the head": ("llama", {}, _hooked("base_model.model.lm_head"), "lm_head has hooks"),
    "hook inside an adapter": (
        "llama",
        {},
        _hooked(f"{BLOCK}.self_attn.q_proj.lora_A.default"),
        "lora_A.default has hooks",
    ),
    "hook inside an MLP": ("llama", {}, _hooked(f"{BLOCK}.mlp.act_fn"), "act_fn has hooks"),
    "no model": ("llama", {}, torch.nn.DataParallel, "not a DataParallel"),
}


def _prompt_config() -> Any:
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)


@pytest.mark.parametrize("bad", BAD_MODELS)
def test_models_that_are_refused(make_model: MakeModel, bad: str) -> None:
    model_type, changes, change, message = BAD_MODELS[bad]
    with pytest.raises(UserError, match=message) as raised:
        tree_loss(change(make_model(model_type, **changes)), **padded(ROWS, "right"))
    assert "\n" not in str(raised.value)


def test_an_unknown_family_is_refused(make_model: MakeModel) -> None:
    model = make_model("llama")
    model.config.model_type = "unheard_of"
    with pytest.raises(UserError, match=r"unheard_of.*the plain way is model\(...\).loss"):
        tree_loss(model, **padded(ROWS, "right"))


def test_dynamic_angles_beyond_the_context_are_refused(make_model: MakeModel) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    peft_model = attach(make_model("llama", rope_parameters=rope, max_position_embeddings=12),
                        AdapterSpec(rank=3), [0], seed=1)  # fmt: skip
    train_mode(peft_model)
    with pytest.raises(UserError, match="more than the model's context of 12"):
        tree_loss(peft_model, **padded(ROWS, "right"))


def test_gradients_that_nobody_would_average_are_refused(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = padded(ROWS, "right")
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="several processes are at work") as raised:
        tree_loss(model, **batch)
    assert "\n" not in str(raised.value)
    with torch.no_grad():
        assert torch.isfinite(tree_loss(model, **batch))
