"""A model with an adapter, without it, or without dropout, for as long as a body runs.

Afterwards it is as it was, bit for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swlora.adapters.base_model import base_model_of
from swlora.adapters.reach import HARMLESS_STARTS
from swlora.adapters.saved import load_adapter, starts_from_the_weights
from swlora.errors import UserError
from swlora.models.module_tree import ModuleTree


@contextmanager
def adapter_on(model: Any, folder: Path) -> Iterator[Any]:
    """Yield the PeftModel of `model` and the adapter in `folder`; afterwards `model` is without it.

    The modules that PEFT wraps or replaces are put back, and so are weights that a method computes
    anew (PiSSA's residual), or in place (OLoRA's), bit for bit, also where loading fails. Raises
    what `load_adapter` does.
    """
    tree = ModuleTree(model)
    writes = starts_from_the_weights(folder)
    weights = [(w, w.data, w.data.clone() if writes else None) for w in model.parameters()]
    try:
        yield load_adapter(model, folder)
    finally:
        tree.restore()
        for weight, data, copy in weights:
            weight.data = data
            if copy is not None:
                data.copy_(copy)


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Let a PeftModel compute as its base while the body runs; a plain model does already.

    Raises UserError where the base is not in it any more: where the adapter was merged, or its
    start or its biases changed the base's own weights.
    """
    if base_model_of(model) is model:
        yield
        return
    if reason := _why_not_off(model):
        raise UserError(
            f"{reason}, so that the model cannot be had without its adapter, which its loss of "
            "English text is compared with: leave that out (--no-english), or name the adapter's "
            "folder"
        )
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in trains:  # PEFT has its own idea of them
            parameter.requires_grad_(requires_grad)


def _why_not_off(model: Any) -> str:
    """Say what of an adapter stays in its model where it is switched off; "" for nothing."""
    for config in model.peft_config.values():
        if getattr(config, "init_lora_weights", True) not in HARMLESS_STARTS:
            return f"the adapter began with a part of the weights ({config.init_lora_weights})"
        if getattr(config, "bias", "none") != "none":
            return "the adapter changed the model's own biases"
    if any(getattr(module, "merged", False) for module in model.modules()):
        return "the adapter is merged into the weights"
    return ""


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Have every module in evaluation mode while the body runs: no dropout."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
