"""Which way attention along a prefix tree is computed on CUDA: a short trial at its first call.

Ways differ in the order of their sums, so a run that goes on takes those with which it began
(`prefer`).
"""

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from swlora.errors import RunFailedError
from swlora.kernels.attention_interface import Scoring
from swlora.kernels.torch_attention import CompiledTooOftenError, dense, flex
from swlora.kernels.tree_layout import TreeLayout
from swlora.memory import is_out_of_memory

Way = Callable[[TreeLayout, Tensor, Tensor, Tensor, Scoring], Tensor]
TIMED_CALLS = 3
# flex keeps nothing that grows with the square of a tree's nodes, and later trees may be larger.
FLEX_LEAD = 1.5

_chosen: dict[str, str] = {}  # kind of attention -> name of the way
_unsaid: list[str] = []


def attend(
    layout: TreeLayout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
    last: Way,
) -> Tensor:
    """Attend along a tree; (1, H, T, h), (1, H_kv, T, h) twice -> (1, T, H, h).

    `last` is the way that needs nothing, tried where the others cannot.
    """
    ways: dict[str, Way] = {"flex": flex, "dense": dense, "chunks": last}
    kind = _kind(query, key, scoring)
    if kind not in _chosen:
        _chosen[kind] = _tried(kind, ways, (layout, query, key, value, scoring))
    try:
        return ways[_chosen[kind]](layout, query, key, value, scoring)
    except CompiledTooOftenError as error:
        _chosen[kind] = "dense" if scoring.softcap is None else "chunks"
        _unsaid.append(f"attention ({kind}): {error}; {_chosen[kind]} from here on")
        return ways[_chosen[kind]](layout, query, key, value, scoring)


def chosen() -> dict[str, str]:
    """Return the way of every kind of attention met so far."""
    return dict(_chosen)


def prefer(ways: Mapping[str, str]) -> None:
    """Take these ways, which `chosen` returned, and try only for other kinds."""
    _chosen.clear()
    _chosen.update(
        {kind: name for kind, name in ways.items() if name in ("flex", "dense", "chunks")}
    )


def news() -> list[str]:
    """Return what was chosen and why since this was last asked, a line for each kind."""
    lines = list(_unsaid)
    _unsaid.clear()
    return lines


def _kind(query: Tensor, key: Tensor, scoring: Scoring) -> str:
    """Name what decides which way is the fastest, and whether it works."""
    dtype = str(query.dtype).removeprefix("torch.")
    more = (" window" if scoring.window else "") + (" soft cap" if scoring.softcap else "")
    return f"{query.shape[1]}/{key.shape[1]} heads of {query.shape[3]}, {dtype}{more}"


def _tried(
    kind: str, ways: Mapping[str, Way], call: tuple[TreeLayout, Tensor, Tensor, Tensor, Scoring]
) -> str:
    """Return the name of the fastest way that works.

    Raises RunFailedError where none does, and what torch raises where the last has no memory.
    """
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, way in ways.items():
        if name == "chunks" and seconds and call[-1].softcap is None:
            break
        try:
            seconds[name] = _seconds(way, *call)
        except Exception as error:  # whatever a compiler or a kernel raises
            if name == "chunks" and not seconds and is_out_of_memory(error):
                raise  # whoever called cuts the tree
            failed[name] = _first_line(error)
    if not seconds:
        raise RunFailedError(f"no way of attention works ({kind}): {failed}")
    best = min(seconds, key=lambda name: seconds[name] / (FLEX_LEAD if name == "flex" else 1))
    told = [f"{name} {1e3 * s:.2f} ms" for name, s in seconds.items()]
    told += [f"not {name} ({reason})" for name, reason in failed.items()]
    _unsaid.append(f"attention ({kind}, {call[1].shape[2]:,} nodes): {best}; {', '.join(told)}")
    return best


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def _seconds(
    way: Way, layout: TreeLayout, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
) -> float:
    """Return the least seconds of forward and backward, without the first call, which compiles.

    An evaluation runs in inference mode, in which nothing has a gradient and whose tensors can be
    kept for none: the trial leaves it, with copies.
    """
    least = float("inf")
    with torch.inference_mode(False), torch.enable_grad():
        query, key, value = inputs = [
            x.detach().clone().requires_grad_() for x in (query, key, value)
        ]
        for call in range(1 + TIMED_CALLS):
            _wait(query.device)
            start_s = time.perf_counter()
            out = way(layout, query, key, value, scoring)
            torch.autograd.grad(out, inputs, torch.ones_like(out))
            _wait(query.device)
            if call:
                least = min(least, time.perf_counter() - start_s)
    return least


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
