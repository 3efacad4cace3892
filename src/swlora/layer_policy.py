"""Which layers to train, as a person writes it: read with the configuration, before any model.

    all | super | super+removal | auto:BUDGET | last:K | first:K | every:K | random:K:SEED | 2,11

`super` takes the layers of verified super weights, `super+removal` also those that take the super
activation out of the residual stream again. `auto:BUDGET` measures (`engine.layer_choice`): it
stays within that share of the time of all layers, or takes all of them. `every:K` takes K evenly
spaced layers that include the last one; `random:K:SEED` draws K.
"""

import difflib
import re
from dataclasses import dataclass

from swlora.errors import UserError

POLICIES = (
    "all, super, super+removal, auto:BUDGET, last:K, first:K, every:K, random:K:SEED "
    "or a list such as 2,11"
)
_SHAPES = {  # of each kind, what follows its name
    "all": r"",
    "super": r"",
    "super+removal": r"",
    "last": r":(\d+)",
    "first": r":(\d+)",
    "every": r":(\d+)",
    "random": r":(\d+):(\d+)",
}


@dataclass(frozen=True)
class LayerPolicy:
    """A policy that was read: its kind, or `list`, and the numbers that follow it."""

    text: str
    kind: str
    numbers: tuple[float, ...] = ()


def parse_policy(text: str) -> LayerPolicy:
    """Read a policy; UserError, with the nearest one, where it is none in whatever model."""
    text = text.replace(" ", "")
    if re.fullmatch(r"\d+(,\d+)*", text, re.ASCII):
        return LayerPolicy(text, "list", tuple(map(int, text.split(","))))
    kind, _, rest = text.partition(":")
    if kind == "auto":
        return LayerPolicy(text, kind, (_share(text, rest),))
    found = re.fullmatch(_SHAPES.get(kind, "(?!)"), text[len(kind) :], re.ASCII)
    if found is None:
        raise UserError(f"{text!r} is not understood{_hint(kind, rest)}; use {POLICIES}")
    numbers = tuple(map(int, found.groups()))
    if numbers and numbers[0] < 1:
        raise UserError(f"{text!r} names no layer: K must be 1 or more")
    return LayerPolicy(text, kind, numbers)


def _share(text: str, budget: str) -> float:
    """Read the budget of `auto:BUDGET`, above 0 and up to 1."""
    share = float(budget) if re.fullmatch(r"\d+\.?\d*|\.\d+", budget, re.ASCII) else 0.0
    if not 0 < share <= 1:
        raise UserError(
            f"{text!r} is not understood: auto:0.5 takes at most half of the time that all layers "
            "take"
        )
    return share


def _hint(kind: str, rest: str) -> str:
    """Return " (do you mean last:4?)" where a kind has nearly that name."""
    near = difflib.get_close_matches(kind, [*_SHAPES, "auto"], n=1)
    meant = f"{near[0]}:{rest}" if near and rest else "".join(near)
    return f" (do you mean {meant}?)" if near and near[0] != kind else ""
