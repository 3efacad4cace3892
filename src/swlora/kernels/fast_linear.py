"""Linear maps in float32 on a CPU through oneDNN instead of the BLAS that torch was built with.

torch hands a float32 product to its BLAS (MKL), which is slow on processors of other makers;
oneDNN, which is in the same build and serves bf16, is not. Same arithmetic, other order of
summation. Weights are read at every call, so a weight that changes counts at once. For inference
only: there is no gradient.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from swlora.kernels.patched_forwards import patched_forwards


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b for x (..., in) and W (out, in) by the fastest product there is."""
    if _has_onednn and x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise(  # type: ignore[no-any-return]
            x, weight, bias, "none", [], ""
        )
    return F.linear(x, weight, bias)


@contextmanager
def fast_linears(model: nn.Module) -> Iterator[None]:
    """Run every Linear and Conv1D of the model through `linear` while the body runs."""
    with patched_forwards({m: _forward(m) for m in model.modules() if type(m) in _MAPS}):
        yield


_MAPS = (nn.Linear, Conv1D)  # exactly these: a subclass may compute something else
_has_onednn = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)


def _forward(module: Any) -> Callable[[Tensor], Tensor]:
    if isinstance(module, Conv1D):
        return lambda x: linear(x, module.weight.t(), module.bias)
    return lambda x: linear(x, module.weight, module.bias)
