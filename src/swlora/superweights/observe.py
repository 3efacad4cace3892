"""What a forward pass puts through the projections and the residual stream, seen by hooks.

Experts of a block are one module, whose inner activations no hook can reach: what each of them did
is computed again from what the router sent it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swlora.models.anatomy import EXPERT_IN, EXPERT_OUT, Anatomy


@dataclass(frozen=True)
class Observation:
    """What went through one projection: x (N, in) and y (N, out) in float32.

    `positions` says, in ascending order, which of the batch's B * T tokens were seen. `group` is
    the name without an expert's number. Outputs of experts come times the routing weight, as they
    enter the residual stream, and so do the inputs that made them: y = W x holds.
    """

    layer: int
    name: str
    group: str
    module: nn.Module
    positions: Sequence[int]
    x: Tensor
    y: Tensor


@contextmanager
def observed(anatomy: Anatomy, observe: Callable[[Observation], None]) -> Iterator[None]:
    """Call `observe` for every projection, and every expert in use, while the body runs.

    Hooks are removed at the end, also when the body raises.
    """
    handles = []
    try:
        for p in anatomy.all_projections():

            def hook(
                module: nn.Module,
                inputs: tuple[Tensor, ...],
                output: Tensor,
                layer: int = p.layer,
                name: str = p.name,
            ) -> None:
                x = inputs[0].flatten(0, -2).float()
                y = output.flatten(0, -2).float()
                observe(Observation(layer, name, name, module, range(len(x)), x, y))

            handles.append(p.module.register_forward_hook(hook))
        for layer in range(anatomy.n_layers):
            if (experts := anatomy.experts(layer)) is not None:

                def expert_hook(
                    module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor, layer: int = layer
                ) -> None:
                    for observation in _expert_observations(anatomy, layer, module, *inputs):
                        observe(observation)

                handles.append(experts.register_forward_hook(expert_hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _expert_observations(
    anatomy: Anatomy, layer: int, experts: Any, hidden: Tensor, index: Tensor, routing: Tensor
) -> Iterator[Observation]:
    """Run again what each expert in use did: hidden (N, D), index and routing (N, experts a token).

    The experts of a block are one module, whose inner activations no hook can see.
    """
    holder = anatomy.family.experts
    for expert in index.unique().tolist():
        positions, ranks = torch.where(index == expert)  # of the tokens, and among their experts
        names = [f"{holder}.{expert}.{part}" for part in (EXPERT_IN, EXPERT_OUT)]
        into, out = (anatomy.projection(layer, name) for name in names)
        x = hidden[positions]
        gate_up = into(x)
        gate, up = gate_up.chunk(2, dim=-1)
        inner = experts.act_fn(gate) * up
        share = routing[positions, ranks, None].float()
        passed = [(x.float(), gate_up.float()), (inner.float() * share, out(inner).float() * share)]
        groups = (f"{holder}.{EXPERT_IN}", f"{holder}.{EXPERT_OUT}")
        for name, group, module, (a, b) in zip(names, groups, (into, out), passed, strict=True):
            yield Observation(layer, name, group, module, positions.tolist(), a, b)


@contextmanager
def followed(anatomy: Anatomy) -> Iterator[list[Tensor]]:
    """Collect the residual stream (B, T, D) before the first block and after each, on the CPU."""
    states: list[Tensor] = []

    def keep(state: Any) -> None:
        hidden = state[0] if isinstance(state, tuple) else state
        states.append(hidden.float().cpu())

    handles = []
    try:
        handles.append(anatomy.blocks[0].register_forward_pre_hook(lambda _, x: keep(x)))
        for block in anatomy.blocks:
            handles.append(block.register_forward_hook(lambda _m, _x, y: keep(y)))
        yield states
    finally:
        for handle in handles:
            handle.remove()
