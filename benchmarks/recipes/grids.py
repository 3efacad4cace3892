"""Named lists of recipes: alternatives stand between bars, and every combination is a recipe.

A line without steps gets as many as run a given number of rows (`budget`). What settings of a line
are to be tried around another base is said with `base`: its keys take the place of the line's.
"""

import math
from itertools import product

from benchmarks.recipes.recipe import Recipe
from swlora.errors import UserError

GRIDS: dict[str, tuple[str, ...]] = {
    # Plain LoRA in all layers with AdamW, whose best is what all others are held against.
    "baseline": (
        "order=pairs batch=8|16|32 rate=2e-3|4e-3|6e-3",
        "order=prompts|iid batch=16 rate=4e-3",
        "order=pairs batch=16 rate=4e-3 beta2=0.95|0.99",
    ),
    "small-steps": (
        "order=pairs batch=4|8|16|32 beta2=0.95|0.98|0.999 rate=2e-3|4e-3",
        "order=pairs batch=4|8 beta2=0.98 rate=1e-3",
        "order=pairs batch=32 beta2=0.95|0.999 rate=6e-3",
        "order=pairs batch=8|16 beta1=0.8 beta2=0.98 rate=4e-3",
    ),
    # Around what twelve steps of eight rows found best, 0.03 and 1e-4, of 3e-3 to 1 for LoRA-Muon
    # and of 3e-5 to 1e-2 for LoRA-RITE
    "optimisers": (
        "order=pairs batch=16 optimizer=scaled-adamw damping=0.01|1e-4 rate=1e-3|4e-3|1.6e-2",
        "order=pairs batch=16 optimizer=lora-muon rate=3e-3|0.01|0.03|0.1|0.3",
        "order=pairs batch=16 optimizer=lora-rite beta2=0.98 rate=1e-5|3e-5|1e-4|3e-4|1e-3",
        "order=pairs batch=16 optimizer=lora-muon b_alone=5 rate=0.01|0.03|0.1",
        "order=pairs batch=16 optimizer=lora-rite beta2=0.98 b_alone=5 rate=1e-4|3e-4",
    ),
    "ends": (
        "order=pairs batch=16 rate=2e-3|4e-3|6e-3 schedule=linear|sqrt:0.2|sqrt:0.5|cosine",
        "order=pairs batch=16 rate=1e-3|2e-3|4e-3 schedule=constant average=0.33",
        # Where the rate has fallen a jump has far to go, and every repeat is measured
        "order=pairs batch=16 rate=5e-4|1e-3|2e-3 schedule=constant jump=6",
    ),
    "width": (
        "order=pairs batch=16 rank=8 rate=1.5e-3|3e-3",
        "order=pairs batch=16 rank=16 rate=1e-3|2e-3",
        "order=pairs batch=16 rank=32 rate=7e-4|1.4e-3",
        "order=pairs batch=16 rank=64 rate=5e-4|1e-3",
        "order=pairs batch=16 rank=16|64 scale=16/sqrt(r) rate=1e-3|2e-3",
        "order=pairs batch=16 method=miss rank=64 rate=1e-3|2e-3|4e-3",
    ),
    "placement": (
        "order=pairs batch=16 rank=4|8 targets=mlp|attention|plop:3 rate=2e-3|4e-3",
        "order=pairs batch=16 rank=8 layers=last:20|every:15 rate=2e-3|4e-3",
    ),
    "data": ("order=pairs batch=16 choice=random|hard|easy|middle|diverse",),
    # What docs/results.md tells of first; each names its steps.
    "earlier": (
        "steps=76|38 prompts=220",
        "steps=76 batch=16 prompts=220",
        "steps=38 rank=16 scale=32/r prompts=220",
        "steps=38 prompts=220 gradient_start=1 rate=5e-4|1e-3|4e-3",
        "steps=38 prompts=220 gradient_start=0.2 rate=2e-3",
        "steps=75",
        "steps=40 order=iid",
        "steps=50 order=pairs batch=32|16",
    ),
}  # fmt: skip


def expand(line: str, budget: int, base: str = "") -> list[Recipe]:
    """Return the recipes of a line; one that names no steps gets those that run `budget` rows.

    A choice of data that names no number of rows chooses `budget` of them.
    """
    keys = _keys(line) | _keys(base)
    recipes = []
    for values in product(*(values.split("|") for values in keys.values())):
        chosen = dict(zip(keys, values, strict=True))
        if "steps" not in chosen:
            chosen["steps"] = str(math.ceil(budget / int(chosen.get("batch", Recipe.batch))))
        if "choice" in chosen:
            chosen.setdefault("rows", str(budget))
        recipes.append(Recipe.parse(" ".join(f"{k}={v}" for k, v in chosen.items())))
    return recipes


def grid(name: str, budget: int, base: str = "") -> list[Recipe]:
    """Return the recipes of a named grid, each once; UserError where there is none of that name."""
    if name not in GRIDS:
        raise UserError(f"no grid is called {name!r}; there are {', '.join(GRIDS)}")
    recipes = [recipe for line in GRIDS[name] for recipe in expand(line, budget, base)]
    return list(dict.fromkeys(recipes))


def _keys(line: str) -> dict[str, str]:
    found = {}
    for word in line.split():
        key, _, value = word.partition("=")
        found[key] = value
    return found
