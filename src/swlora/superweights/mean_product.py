"""A weight's product replaced by its mean: is it the number that counts, or that it varies?

At position t a weight W[j, k] adds p_t = W[j, k] x_k(t) to output channel j. With the weight at
zero, a constant is added to that channel instead, and the loss measured again:

    everywhere   the mean of p over all positions of the other windows, at every position
    by size      at positions where |p_t| is at least half of the text's largest, the mean of p over
                 such positions of the other windows; at all others the mean over all others there

If "by size" restores the model, the weight serves as a bias at some positions, as massive
activations do (arXiv 2402.17762, section 3: zero breaks a model, the mean does not). If
"everywhere" does too, it need not even know the position. Other windows, since one position of a
window has most of the product: its own mean would be the product itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp
from typing import Any

import torch
from torch import Tensor, nn

from swlora.errors import UserError
from swlora.kernels.block_walk import Walk
from swlora.kernels.linear.backends import forwards_without_copies
from swlora.kernels.patched_forwards import patched_forwards
from swlora.models.anatomy import Anatomy, WeightAddress
from swlora.processes import dealt
from swlora.superweights.ablate import zeroed
from swlora.superweights.meter import Meter, rise_nats
from swlora.superweights.observe import Observation, observed

LARGE_SHARE = 0.5  # of the text's largest product


@dataclass(frozen=True)
class MeanRestored:
    """Ratios of perplexity, over that of the intact model, with a mean in place of the product.

    `n_large` of `n_positions` products are large; their mean is `mean_large`, that of all
    products `mean`, both over the whole text. 1 is a model as good as the intact one.
    """

    ratio_everywhere: float
    ratio_by_size: float
    mean: float
    mean_large: float
    n_large: int
    n_positions: int


def restore_mean(meter: Meter, address: WeightAddress) -> MeanRestored:
    """Measure the text with the mean of a weight's product in its place; see above.

    Needs two windows at least: raises UserError where there is one.
    """
    if meter.n_windows < 2:
        raise UserError("a mean over other windows of text needs --windows 2 or more")
    base = meter.measure({}, keep=[address.layer])
    products = weight_products(meter.anatomy, meter.windows, address)  # (n, T)
    large = large_ones(products)

    def ratio(kinds: Tensor) -> float:
        change = _replaced(meter.anatomy, address, means_of_others(products, kinds))
        return exp(rise_nats(base, meter.measure_within(change, lowest_layer=address.layer)))

    everywhere, by_size = dealt([torch.ones_like(large), large], ratio)
    return MeanRestored(
        ratio_everywhere=everywhere,
        ratio_by_size=by_size,
        mean=float(products.mean()),
        mean_large=float(products[large].mean()),
        n_large=int(large.sum()),
        n_positions=products.numel(),
    )


@torch.inference_mode()
def weight_products(anatomy: Anatomy, windows: Tensor, address: WeightAddress) -> Tensor:
    """Return W[j, k] x_k at every position of windows (n, T), as (n, T) in float64.

    An expert's is 0 where the router sent it nothing, and comes times the routing weight.
    """
    weight, (n, length) = float(anatomy.weight_view(address)), windows.shape
    products = torch.zeros(n, length, dtype=torch.float64)
    seen: list[Tensor] = []

    def observe(o: Observation) -> None:
        if (o.layer, o.name) == (address.layer, address.module):
            row = torch.zeros(length, dtype=torch.float64)
            row[list(o.positions)] = o.x[:, address.in_channel].cpu().double() * weight
            seen.append(row)

    stop = address.layer + 1 if address.layer + 1 < anatomy.n_layers else None
    walk, fast = Walk(anatomy), patched_forwards(forwards_without_copies(anatomy.backbone))
    with fast, observed(anatomy, observe):
        for i, window in enumerate(windows.split(1)):
            seen.clear()
            walk.run({"input_ids": window, "use_cache": False}, stop=stop)
            products[i] = sum(seen, products[i])
    return products


def large_ones(products: Tensor) -> Tensor:
    """Say which products are at least half as large as the largest, as bool of their shape."""
    sizes = products.abs()
    return sizes >= LARGE_SHARE * sizes.max()


def means_of_others(products: Tensor, large: Tensor) -> Tensor:
    """Return for every product the mean of those of its kind in the other windows.

    products (n, T), large (n, T) bool, the kind of each; 0 where the other windows have none.
    """
    means = torch.zeros_like(products)
    for kind in (large, ~large):
        sums, counts = (products * kind).sum(dim=1), kind.sum(dim=1)
        others = (sums.sum() - sums) / (counts.sum() - counts).clamp_min(1)  # (n,)
        means += others[:, None] * kind
    return means


@contextmanager
def _replaced(anatomy: Anatomy, address: WeightAddress, values: Tensor) -> Iterator[None]:
    """Let a weight be zero, and add values (n, T) to its output channel, window after window."""
    rest, channel = values.flatten(), address.out_channel

    def add(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        nonlocal rest
        now, rest = rest.tensor_split([output.numel() // output.shape[-1]])
        changed = output.clone()
        changed[..., channel] += now.to(output).view(output.shape[:-1])
        return changed

    with zeroed(anatomy, [address]):
        handle = _module_of(anatomy, address).register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()


def _module_of(anatomy: Anatomy, address: WeightAddress) -> nn.Module:
    """Return the module that puts an address's products out; of an expert, all of its block."""
    experts = anatomy.experts(address.layer)
    known = {p.name: p.module for p in anatomy.projections(address.layer)}
    if experts is not None and address.module not in known:
        return experts
    return anatomy.projection(address.layer, address.module)
