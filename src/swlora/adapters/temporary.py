"""An adapter on a model for as long as a body runs, and the model as it was again after it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swlora.adapters.saved import load_adapter, starts_from_the_weights
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
