"""Sums and copies of tensors over all processes, by gloo on CPUs and NCCL on CUDA."""

import atexit
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from swlora.errors import UserError
from swlora.plural import counted
from swlora.processes.joining import (
    check_alike,
    ended_well,
    failing_together,
    from_main,
    gathered,
    team,
)
from swlora.processes.world import world

FOR_EVER = timedelta(days=30)  # who is gone is missed by other means


def start_group(device: str) -> None:
    """Let the processes exchange tensors of a device: "cpu", "cuda", or "auto" for what is there.

    Raises UserError, naming it, where a process has no GPU of its own.
    """
    us = world()
    if not us.is_shared:
        return
    from accelerate.state import PartialState

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_alike("devices", {"device": device})
    if device == "cuda":
        _check_gpus(us.local_rank)
    elif device != "cpu":
        raise UserError(f"several processes work on CPUs and on CUDA, not on {device}")
    with failing_together("the exchange of tensors"):
        PartialState(cpu=device == "cpu", timeout=FOR_EVER)
    atexit.register(_end_group)


def _end_group() -> None:
    """Let go of the others, unless some of them are gone: that would wait for them."""
    from torch import distributed

    if distributed.is_initialized() and ended_well():
        distributed.destroy_process_group()


def _check_gpus(local_rank: int) -> None:
    n_there = gathered([local_rank, torch.cuda.device_count()])
    for rank, (own, n) in enumerate(n_there):
        if own >= n:
            gpus = counted(n, "GPU")
            raise UserError(
                f"rank {rank} has no GPU of its own: its machine has {gpus}, and it would take "
                f"number {own}; start as many processes there as it has GPUs, or with --device cpu"
            )


def summed(tensors: Sequence[Tensor]) -> None:
    """Add up tensors over all processes of the team, in place; all get the same bits.

    Each dtype and device travels as one buffer.
    """
    from torch import distributed

    if not team().is_shared:
        return
    kinds = {(tensor.dtype, tensor.device): None for tensor in tensors}
    for kind in kinds:
        own = [tensor for tensor in tensors if (tensor.dtype, tensor.device) == kind]
        flat = torch.cat([tensor.reshape(-1) for tensor in own])
        with failing_together("the sum over all processes"):
            distributed.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in own])
        torch._foreach_copy_(own, [p.view_as(t) for p, t in zip(parts, own, strict=True)])


def tensors_from_main(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the tensors of the first process by their names, in all of them; on `device`."""
    from torch import distributed

    if not team().is_shared:
        return dict(tensors)
    kinds: list[Any] = from_main(
        lambda: [[name, str(t.dtype), t.shape] for name, t in tensors.items()]
    )
    found: dict[str, Tensor] = {}
    for name, dtype, shape in kinds:
        if world().is_main:
            tensor = tensors[name].detach().to(device).contiguous()
        else:
            kind = getattr(torch, dtype.removeprefix("torch."))
            tensor = torch.empty(shape, dtype=kind, device=device)
        raw = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
        with failing_together("the copy to all processes"):
            distributed.broadcast(raw, 0)
        found[name] = tensor
    return found
