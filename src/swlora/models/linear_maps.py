"""Which modules are the linear map of their weight, x W' + b, and which may compute otherwise.

Other libraries keep weights in 8 or 4 bits in subclasses of nn.Linear (bitsandbytes, FP8), or in
tensors of their own class (torchao): packed or scaled, so that W is not what `weight` holds.
"""

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from swlora.models.anatomy import weight_out_in
from swlora.models.quantised_weight import QuantisedWeight
from swlora.models.sharded_weight import is_sharded

MAPS = (nn.Linear, Conv1D)  # exactly these: a subclass may compute something else
SAME_AS_LINEAR = frozenset({"FalconLinear"})  # subclasses by name: x @ W.T + b, in two operations


def is_linear_map(module: Any) -> bool:
    """Say whether a module computes x W' + b from the weight that it holds."""
    is_known = type(module) in MAPS or type(module).__name__ in SAME_AS_LINEAR
    return is_known and has_own_weight(module)


def has_own_weight(module: Any) -> bool:
    """Say whether the weight's class is torch's or ours, not one of another library."""
    weight = module.weight
    return type(weight) in (nn.Parameter, Tensor, QuantisedWeight) or is_sharded(weight)


def shape_out_in(module: Any) -> tuple[int, int]:
    """Return a projection's output and input channels, which packed weights do not show."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    n_out, n_in = weight_out_in(module).shape
    return n_out, n_in
