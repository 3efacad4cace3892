"""The dtype in which sums, norms and softmaxes are computed."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Return x in float32, or as it is where it is wider already (tests run in float64)."""
    return x if x.dtype == torch.float64 else x.float()
