"""Which layers are trained: a policy such as `last:4`, turned into layer numbers.

    all | super | super+removal | auto:BUDGET | last:K | first:K | every:K | random:K:SEED | 2,11

`super` takes the layers of verified super weights, `super+removal` also those that take the super
activation out of the residual stream again. `auto:BUDGET` measures (`engine.layer_choice`) and
stays within that share of the time of all layers. `every:K` takes K evenly spaced layers that
include the last one; `random:K:SEED` draws K.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from swlora.errors import UserError

POLICIES = (
    "all, super, super+removal, auto:BUDGET, last:K, first:K, every:K, random:K:SEED "
    "or a list such as 2,11"
)


@dataclass(frozen=True)
class Identified:
    """What `identify` found: layers of verified super weights, and where their activation ends."""

    super_layers: Sequence[int]
    removal_layers: Sequence[int]


def needs_identification(policy: str) -> bool:
    """Say whether the policy depends on verified super weights."""
    return policy in ("super", "super+removal")


def time_budget(policy: str) -> float | None:
    """Return the budget of `auto:BUDGET`, a share of all layers' time; None for other policies.

    Raises UserError where it is no number above 0 and up to 1.
    """
    kind, _, budget = policy.partition(":")
    if kind != "auto":
        return None
    try:
        share = float(budget)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(
            f"--layers {policy!r} is not understood: auto:0.5 takes at most half of the time that "
            "all layers take"
        )
    return share


def resolve_layers(policy: str, n_layers: int, identified: Identified | None = None) -> list[int]:
    """Return sorted layer numbers for `policy` in a model of `n_layers` blocks.

    `identified` is needed by `super` and `super+removal` only.
    Raises UserError for an unknown policy, layers out of range, or no layer at all.
    """
    if policy == "all":
        return list(range(n_layers))
    if needs_identification(policy):
        return _super(policy, identified)
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


def _super(policy: str, identified: Identified | None) -> list[int]:
    if identified is None:
        raise UserError(f"--layers {policy} needs the layers that identify verified")
    if not identified.super_layers:
        raise UserError(
            f"no super weight was verified in this model, so --layers {policy} names no layer; "
            "choose all, last:K or a list"
        )
    removal = identified.removal_layers if policy == "super+removal" else ()
    return sorted({*identified.super_layers, *removal})


def _checked(layers: list[int], n_layers: int) -> list[int]:
    outside = [layer for layer in layers if layer >= n_layers]
    if outside:
        raise UserError(
            f"layer {outside[0]} does not exist; this model has layers 0 to {n_layers - 1}"
        )
    return sorted(set(layers))
