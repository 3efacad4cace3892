"""A frozen weight of which every process holds some rows, as FSDP2 makes it."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard


def is_sharded(weight: Any) -> bool:
    """Say whether a tensor is a process's part of a weight."""
    return isinstance(weight, DTensor)


def has_sharded(model: nn.Module) -> bool:
    """Say whether processes share the weights of a model."""
    return any(map(is_sharded, model.parameters()))


def whole(weight: Tensor) -> Tensor:
    """Return a sharded weight as an ordinary tensor, gathered from all processes; others as is.

    All processes must ask for it together.
    """
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def own_part(weight: Tensor) -> Tensor:
    """Return the part of a sharded weight that this process holds; other weights as they are."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def own_rows(n_rows: int, mesh: Any) -> slice:
    """Return which rows of a weight this process of a mesh holds, as FSDP2 divides them."""
    n_each = -(-n_rows // mesh.size())
    start = min(n_rows, n_each * mesh.get_local_rank())
    return slice(start, min(n_rows, start + n_each))


def as_part(rows: Tensor, weight: Tensor, mesh: Any) -> DTensor:
    """Return this process's rows of a weight as the part of one with its shape."""
    shape, stride = weight.shape, weight.stride()
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
