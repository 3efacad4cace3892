"""Random numbers by a seed of one's own, beside the stream of whoever calls."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def drawing_by(seed: int, device: torch.device) -> Iterator[None]:
    """Draw by `seed` in the body, on the CPU and `device`; both generators are as before after it.

    `torch.manual_seed` would do so to the generators of all devices, and for good.
    """
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus, device_type="cuda"):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield
