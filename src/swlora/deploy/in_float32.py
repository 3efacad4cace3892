"""A model that computes in float32 whatever its weights are held in, and holds few of them so.

The weights of a block are cast when it runs, and are what they were after it. Those that lie in
mapped files give their pages back, so that a model of any size runs in the memory of one block.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from swlora.adapters.base_model import base_model_of
from swlora.memory import release_pages
from swlora.models.anatomy import Anatomy


@contextmanager
def computed_in_float32(model: Any) -> Iterator[None]:
    """Let a model, or a PeftModel of one, compute in float32 while the body runs.

    Weights in mapped files must be as the files have them.
    """
    units = [_Unit(module) for module in units_of(model)]
    handles = [handle for unit in units for handle in unit.hooks()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for unit in units:
            unit.put_back()


class _Unit:
    """A module whose weights are cast together."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._held: list[tuple[nn.Parameter, Tensor]] = []

    def hooks(self) -> list[Any]:
        return [
            self._module.register_forward_pre_hook(lambda *_: self._cast()),
            self._module.register_forward_hook(lambda *_: self.put_back(), always_call=True),
        ]

    def _cast(self) -> None:
        weights = (p for p in self._module.parameters() if p.is_floating_point())
        self._held = [(weight, weight.data) for weight in weights]
        for weight, data in self._held:
            weight.data = data.to(torch.float32)

    def put_back(self) -> None:
        for weight, data in self._held:
            weight.data = data
        release_pages(data for _, data in self._held)
        self._held = []


def has_weights(module: nn.Module) -> bool:
    """Say whether a module holds weights itself, and not in modules inside it alone."""
    return next(module.parameters(recurse=False), None) is not None


def units_of(model: Any) -> list[nn.Module]:
    """Return modules that hold all weights between them: blocks, and what stands beside those."""
    base = base_model_of(model)
    blocks = {id(block) for block in Anatomy(base).blocks}
    return list(_units_in(base, blocks))


def _units_in(module: nn.Module, blocks: set[int]) -> Iterator[nn.Module]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    is_wrapper = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    if id(module) in blocks or is_wrapper or has_weights(module):
        yield module
        return
    for child in module.children():
        yield from _units_in(child, blocks)
