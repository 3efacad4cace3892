"""An adapter's file beside the model: PEFT writes whatever it finds there into the model.

Beside an adapter of embeddings or head, PEFT saves the model's own, so their presence is no fault;
but a file must not bring other numbers for what belongs to the model.
"""

import re
from pathlib import Path
from typing import Any

import torch

from swlora.errors import UserError

_ADAPTER = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)")


def check_tensors(model: Any, weights: Path) -> None:
    """Raise UserError where a LoRA's file would change one of the model's own tensors.

    `model` may hold other adapters already.
    """
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - this object has no __iter__
            if _ADAPTER.search(key):
                continue
            own, shape = _own_tensor(model, key), tuple(file.get_slice(key).get_shape())
            is_own = own is not None and shape == tuple(own.shape)
            if not is_own or not torch.equal(file.get_tensor(key).to(own), own):
                raise UserError(
                    "this adapter brings other numbers for the model's own tensors "
                    f"({key.removeprefix('base_model.model.')[:80]}); PEFT saves those of the "
                    "model it was trained on, in that model's dtype"
                )


def _own_tensor(model: Any, key: str) -> Any:
    """Return the model's tensor that a key of an adapter's file names; None where there is none."""
    path = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
    module_name, _, tensor_name = path.rpartition(".")
    try:
        module = model.get_submodule(module_name)
        module = getattr(module, "base_layer", module)
        return getattr(module, tensor_name).detach()
    except AttributeError:
        return None
