"""Random weights to stand beside a candidate: of the same matrix and of nearly its magnitude.

The magnitude alone could be what makes an ablation harmful, so the controls share it as far as
the matrix allows: they are drawn, without replacement, from the weights nearest in |w|, five times
as many as are needed and all that are no farther off. A candidate is often among the largest of
its matrix; then its controls are the next largest ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from swlora.errors import UserError
from swlora.models.anatomy import Anatomy, WeightAddress, weight_out_in
from swlora.plural import counted
from swlora.result_json import FLAT

POOL_PER_CONTROL = 5


@dataclass(frozen=True)
class Control:
    """A random weight beside a candidate."""

    address: WeightAddress = field(metadata=FLAT)
    weight: float


def draw_controls(
    anatomy: Anatomy, addresses: Sequence[WeightAddress], n: int, seed: int
) -> dict[WeightAddress, tuple[Control, ...]]:
    """Return `n` controls for every address; none is an address itself, none serves two.

    Raises UserError where a matrix is too small for that.
    """
    taken = set(addresses)
    controls: dict[WeightAddress, tuple[Control, ...]] = {}
    for number, address in enumerate(addresses):
        same_matrix = [t for t in taken if (t.layer, t.module) == (address.layer, address.module)]
        random = np.random.default_rng([seed, number])
        controls[address] = _draw(anatomy, address, same_matrix, n, random)
        taken.update(control.address for control in controls[address])
    return controls


def _draw(
    anatomy: Anatomy,
    address: WeightAddress,
    excluded: Sequence[WeightAddress],
    n: int,
    random: np.random.Generator,
) -> tuple[Control, ...]:
    matrix = weight_out_in(anatomy.projection(address.layer, address.module))  # (out, in)
    size = matrix.float().abs()
    distance = (size - size[address.out_channel, address.in_channel]).abs()
    for other in excluded:
        distance[other.out_channel, other.in_channel] = torch.inf
    distance = distance.flatten()  # position out * n_in + in, however the matrix is stored
    n_pool = min(POOL_PER_CONTROL * n, int(distance.isfinite().sum()))
    if n_pool < n:
        raise UserError(f"the matrix of {address} is too small for {counted(n, 'control')}")
    farthest = distance.topk(n_pool, largest=False).values[-1]
    pool = (distance <= farthest).nonzero()[:, 0]
    controls = []
    for i in random.choice(len(pool), n, replace=False).tolist():
        out_channel, in_channel = divmod(int(pool[i]), matrix.shape[1])
        control = replace(address, out_channel=out_channel, in_channel=in_channel)
        controls.append(Control(control, float(matrix[out_channel, in_channel])))
    return tuple(controls)
