"""What a model is, as bytes for a hash: what was computed from it is kept under such a name."""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from swlora.models.quantised_weight import numbers


class Digest(Protocol):
    """A hash of `hashlib`."""

    def update(self, data: Any, /) -> None:
        """Add bytes."""


def config_values(config: Any) -> dict[str, Any]:
    """Return a model's configuration without what differs between equal models."""
    values: dict[str, Any] = config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "use_cache"):
        values.pop(volatile, None)
    return values


def add_weights(digest: Digest, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Add names, dtypes, shapes and bytes of weights."""
    for name, tensor in weights:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = numbers(tensor.detach())
        digest.update(plain.cpu().contiguous().view(torch.uint8).numpy().data)
