"""Which layers are trained: a policy such as `last:4`, turned into layer numbers of a model."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from swlora.errors import UserError
from swlora.layer_policy import parse_policy


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
    return parse_policy(policy).numbers[0] if policy.startswith("auto") else None


def resolve_layers(policy: str, n_layers: int, identified: Identified | None = None) -> list[int]:
    """Return sorted layer numbers for `policy` in a model of `n_layers` blocks.

    `identified` is needed by `super` and `super+removal` only.
    Raises UserError for an unknown policy, layers out of range, or no layer at all.
    """
    parsed = parse_policy(policy)
    numbers = [int(number) for number in parsed.numbers]
    match parsed.kind:
        case "all":
            return list(range(n_layers))
        case "super" | "super+removal":
            return _super(policy, identified)
        case "list":
            return _checked(numbers, n_layers)
        case "auto":
            raise UserError(f"--layers {policy} needs a measurement of the layers")
    k = numbers[0]
    if k > n_layers:
        raise UserError(f"--layers {policy}: K must be from 1 to {n_layers}, the model's layers")
    match parsed.kind:
        case "last":
            return list(range(n_layers - k, n_layers))
        case "first":
            return list(range(k))
        case "every":
            return sorted({round((i + 1) * n_layers / k) - 1 for i in range(k)})
        case _:
            return sorted(random.Random(numbers[1]).sample(range(n_layers), k))


def layer_ranges(layers: Sequence[int]) -> str:
    """Write [0, 1, 2, 5] as "0-2, 5"."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


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
