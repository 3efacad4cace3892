"""The dtype in which sums, norms and softmaxes are computed."""

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or float64 where the dtype is that already (tests run in it)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """Return x in its wide dtype."""
    return x.to(wide_dtype(x.dtype))
