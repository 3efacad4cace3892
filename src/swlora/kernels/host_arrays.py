"""Arrays of the host on a device, without a wait for what the device still computes."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return the array as a tensor on the device; the array must not change from then on.

    On CUDA it is copied from pinned memory in the order of the device's work. A plain copy would
    end only when all that was asked of the device before has been done.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
