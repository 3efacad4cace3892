"""The blocks' weights rounded to int8 and int4, with super weights held out and without.

Round to nearest between the smallest and the largest weight of a group, as in section 4 of arXiv
2411.07191 and its authors' code:

    step = (high - low) / (2^bits - 1)        W' = round((W - low) / step) step + low

A group is a matrix (`tensor`), the weights of an output channel (`channel`), or 128 neighbours of
such a row, fewer at its end (`block`). A weight that is held out has no part in `low` and `high`,
and keeps its value. The paper also clips other outliers, by a bound that it does not tell; here
nothing is clipped. All projections of all blocks are rounded; embeddings, norms and head are not.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import exp
from typing import Literal, get_args

import torch
from torch import Tensor

from swlora.models.anatomy import EXPERT_IN, EXPERT_OUT, Anatomy, WeightAddress, weight_out_in
from swlora.processes import dealt, world
from swlora.progress import Progress
from swlora.superweights.meter import Meter, rise_nats

Group = Literal["tensor", "channel", "block"]
BLOCK_WEIGHTS = 128
BITS = (8, 4)


@dataclass(frozen=True)
class Rounded:
    """Ratios of perplexity to the intact model's: all weights rounded, and all but some.

    `ratio_held` is the one with the super weights held out.
    """

    bits: int
    group: Group
    ratio: float
    ratio_held: float


def measure_rounding(
    meter: Meter, held: Sequence[WeightAddress], progress: Progress
) -> tuple[Rounded, ...]:
    """Round the model to every number of bits in every kind of group, and measure the text.

    The model is afterwards what it was, bit for bit. It takes the memory of a copy of its blocks.
    """
    base = meter.measure({})
    ways = [(bits, group, kept) for bits in BITS for group in get_args(Group) for kept in (0, 1)]
    with progress.task("round to int8 and int4", len(ways)) as task:

        def ratio(way: tuple[int, Group, int]) -> float:
            bits, group, kept = way
            change = rounded_model(meter.anatomy, bits, group, held if kept else ())
            rise = rise_nats(base, meter.measure_within(change))
            task.advance(world().size, f"int{bits}, {group}")
            return exp(rise)

        ratios = dealt(ways, ratio)
    pairs = zip(ways[::2], ratios[::2], ratios[1::2], strict=True)
    return tuple(Rounded(bits, group, *both) for (bits, group, _), *both in pairs)


@contextmanager
def rounded_model(
    anatomy: Anatomy, bits: int, group: Group, held: Collection[WeightAddress] = ()
) -> Iterator[None]:
    """Let a model's projections be rounded while the body runs; then they are what they were."""
    with ExitStack() as stack, torch.no_grad():
        for layer in range(anatomy.n_layers):
            for parameter, names in _parameters(anatomy, layer):
                stack.callback(setattr, parameter, "data", parameter.data)
                parameter.data = parameter.data.clone()
                for name in names:
                    weight = weight_out_in(anatomy.projection(layer, name))
                    places = [
                        (a.out_channel, a.in_channel)
                        for a in held
                        if (a.layer, a.module) == (layer, name)
                    ]
                    weight.copy_(rounded(weight, bits, group, places))
        yield


def rounded(
    weight: Tensor, bits: int, group: Group, held: Collection[tuple[int, int]] = ()
) -> Tensor:
    """Return a matrix (out, in) rounded, in float32; `held` are (out, in) that keep their value."""
    values = weight.float()
    is_held = torch.zeros_like(values, dtype=torch.bool)
    for out_channel, in_channel in held:
        is_held[out_channel, in_channel] = True
    if group == "tensor":
        parts = [_rounded_rows(values.reshape(1, -1), is_held.reshape(1, -1), bits)]
        return parts[0].view_as(values)
    width = BLOCK_WEIGHTS if group == "block" else values.shape[1]
    pairs = zip(values.split(width, dim=1), is_held.split(width, dim=1), strict=True)
    return torch.cat([_rounded_rows(*pair, bits) for pair in pairs], dim=1)


def _rounded_rows(rows: Tensor, is_held: Tensor, bits: int) -> Tensor:
    """Round every row as a group of its own."""
    low = rows.masked_fill(is_held, torch.inf).amin(dim=1, keepdim=True)
    high = rows.masked_fill(is_held, -torch.inf).amax(dim=1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    near = ((rows - low) / step).round_().mul_(step).add_(low)
    return torch.where(is_held | (step == 0), rows, near)  # equal weights are exact as they are


def _parameters(anatomy: Anatomy, layer: int) -> Iterator[tuple[torch.nn.Parameter, Sequence[str]]]:
    """Yield a block's parameters that hold projections, with the names of these."""
    for p in anatomy.projections(layer):
        yield p.module.get_parameter("weight"), [p.name]
    if (experts := anatomy.experts(layer)) is not None:
        for part in (EXPERT_IN, EXPERT_OUT):
            parameter = experts.get_parameter(part)
            holder = anatomy.family.experts
            yield parameter, [f"{holder}.{i}.{part}" for i in range(len(parameter))]
