"""Full-rank updates of whole projections, weight and bias, with no adapter.

    y = W x + b in the dtype of x, from float32 masters that the optimizer moves

PEFT knows them as `modules_to_save`: copies beside the frozen originals, saved under the names of
the model, so that its own loader puts them back. They are saved in the model's dtype, in which they
were used.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from swlora.adapters.adapted import NAME, Adapted
from swlora.adapters.site import Site
from swlora.config import AdapterSpec


def config(_spec: AdapterSpec, site: Site) -> Any:
    """Return PEFT's configuration of no adapter, and of whole modules that are trained."""
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES

    return LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=DUMMY_TARGET_MODULES,
        modules_to_save=list(site.modules),
    )


class MasterLinear(nn.Module):
    """A linear map with weights of at least float32, in their own layout, computed in x's dtype."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.transposed = isinstance(linear, Conv1D)
        for name in ("weight", "bias"):
            values = getattr(linear, name)
            if values is not None:
                dtype = torch.promote_types(values.dtype, torch.float32)
                values = nn.Parameter(values.detach().to(dtype))
            self.register_parameter(name, values)

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b, (..., out)."""
        weight = self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, weight.t() if self.transposed else weight, bias)


class Full(Adapted):
    """Trains float32 masters; in the end they are cast to the dtype in which they were used."""

    def __init__(self, model: Any, spec: AdapterSpec) -> None:
        from peft.utils.other import ModulesToSaveWrapper

        self._wrappers = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
        for wrapper in self._wrappers:
            wrapper.modules_to_save[NAME] = MasterLinear(wrapper.modules_to_save[NAME])
        super().__init__(model, spec)

    def finish(self) -> None:
        """Cast the masters to the model's dtype."""
        for wrapper in self._wrappers:
            wrapper.modules_to_save[NAME].to(wrapper.original_module.weight.dtype)

    @contextmanager
    def as_saved(self) -> Iterator[None]:
        """Put cast copies into the masters' places while the body runs."""
        masters = [wrapper.modules_to_save[NAME] for wrapper in self._wrappers]
        try:
            for wrapper, master in zip(self._wrappers, masters, strict=True):
                wrapper.modules_to_save[NAME] = copy.deepcopy(master)
            self.finish()
            yield
        finally:
            for wrapper, master in zip(self._wrappers, masters, strict=True):
                wrapper.modules_to_save[NAME] = master
