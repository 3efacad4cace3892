"""Which layers are trained: a policy such as `last:4`, turned into layer numbers.

    all | super | last:K | first:K | every:K | random:K:SEED | 2,11

`every:K` takes K evenly spaced layers that include the last one; `random:K:SEED` draws K.
"""

import random
import re
from collections.abc import Sequence

from swlora.errors import UserError

POLICIES = "all, super, last:K, first:K, every:K, random:K:SEED or a list such as 2,11"


def needs_identification(policy: str) -> bool:
    """Say whether the policy depends on verified super weights."""
    return policy == "super"


def resolve_layers(
    policy: str, n_layers: int, super_layers: Sequence[int] | None = None
) -> list[int]:
    """Return sorted layer numbers for `policy` in a model of `n_layers` blocks.

    `super_layers` are the layers of verified super weights, needed by `super` only.
    Raises UserError for an unknown policy, layers out of range, or no layer at all.
    """
    if policy == "all":
        return list(range(n_layers))
    if policy == "super":
        return _super(super_layers)
    if re.fullmatch(r"\d+(,\d+)*", policy.replace(" ", "")):
        return _checked([int(part) for part in policy.split(",")], n_layers)
    kind, *numbers = policy.split(":")
    if not all(part.isdecimal() for part in numbers) or not numbers:
        raise UserError(f"--layers {policy!r} is not understood; use {POLICIES}")
    k, *rest = map(int, numbers)
    if not 1 <= k <= n_layers:
        raise UserError(f"--layers {policy}: K must be from 1 to {n_layers}, the model's layers")
    if kind == "last" and not rest:
        return list(range(n_layers - k, n_layers))
    if kind == "first" and not rest:
        return list(range(k))
    if kind == "every" and not rest:
        return sorted({round((i + 1) * n_layers / k) - 1 for i in range(k)})
    if kind == "random" and len(rest) == 1:
        return sorted(random.Random(rest[0]).sample(range(n_layers), k))
    raise UserError(f"--layers {policy!r} is not understood; use {POLICIES}")


def _super(super_layers: Sequence[int] | None) -> list[int]:
    if super_layers is None:
        raise UserError("--layers super needs the layers that identify verified")
    if not super_layers:
        raise UserError(
            "no super weight was verified in this model, so --layers super names no layer; "
            "choose all, last:K or a list"
        )
    return sorted(set(super_layers))


def _checked(layers: list[int], n_layers: int) -> list[int]:
    outside = [layer for layer in layers if layer >= n_layers]
    if outside:
        raise UserError(
            f"layer {outside[0]} does not exist; this model has layers 0 to {n_layers - 1}"
        )
    return sorted(set(layers))
