"""What is compared: one entry an arm, and how many rows of the data set it is given.

An arm names a stack, its rows a step and the layers that carry adapters (LoRA r = 4 on every
linear map of a block, alpha 32, no dropout, AdamW). Rows are those that are timed: about half a
minute's worth of each stack with `--quick`, two with a full run.
"""

from dataclasses import dataclass
from typing import Literal

LORA_RANK = 4
LORA_ALPHA = 32.0
LEARNING_RATE = 2e-3
POOL_ROWS = 1600  # the rows that all arms draw from: one mega-batch of a length-grouping Trainer

Kind = Literal["original", "peft", "trl", "unsloth", "ours"]
Layout = Literal["padded", "packed", "padding-free", "flat"]


@dataclass(frozen=True)
class Arm:
    """One configuration of one stack; `layers` None is all of them, "super" asks identify."""

    name: str
    kind: Kind
    batch: int
    rows_quick: int  # 0: not part of a quick run
    rows_full: int
    layers: tuple[int, ...] | Literal["super"] | None = None
    layout: Layout = "padded"  # of peers, or "flat": our engine with nothing shared
    epochs: int = 1  # 2 where a cache makes later epochs cheaper
    compiled: bool = False

    @property
    def is_peer(self) -> bool:
        """Whether it competes for "best peer": another stack, with adapters in all layers."""
        return self.kind in ("peft", "trl", "unsloth") and self.layers is None

    def rows(self, quick: bool) -> int:
        return self.rows_quick if quick else self.rows_full


def _ours(name: str, batch: int, quick: int, full: int, **more: object) -> Arm:
    return Arm(name, "ours", batch, quick, full, **more)  # type: ignore[arg-type]


# In the order in which they are run: what a quick run could do without comes last.
_ARMS = (
    Arm("original", "original", 8, 16, 32),
    Arm("peft-16", "peft", 16, 96, 384),
    Arm("peft-32", "peft", 32, 96, 384),
    _ours("ours-32", 32, 480, 1600),
    Arm("trl-16", "trl", 16, 96, 384),
    _ours("ours-11-28-29", 32, 480, 1600, layers=(11, 28, 29), epochs=2),
    _ours("ours-28-29", 32, 480, 1600, layers=(28, 29), epochs=2),
    Arm("trl-packed", "trl", 4, 96, 384, layout="packed"),
    _ours("ours-64", 64, 640, 1600),
    _ours("ours-super", 32, 480, 1600, layers="super", epochs=2),
    Arm("peft-8", "peft", 8, 0, 256),
    Arm("trl-32", "trl", 32, 0, 384),
    Arm("trl-padding-free", "trl", 32, 0, 384, layout="padding-free"),
    Arm("peft-32-28-29", "peft", 32, 0, 640, layers=(28, 29)),
    Arm("peft-32-11-28-29", "peft", 32, 0, 384, layers=(11, 28, 29)),
)
ARMS: dict[str, Arm] = {arm.name: arm for arm in _ARMS}
PACKED_ROW_TOKENS = 512

# Those of the scenarios, whose rows a step depend on the scenario; all layers
SCENARIO_ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("ours", "ours", 0, 0, 0),
        Arm("ours-flat", "ours", 0, 0, 0, layout="flat"),
        Arm("peft", "peft", 0, 0, 0),
        Arm("unsloth", "unsloth", 0, 0, 0),
        Arm("trl", "trl", 0, 0, 0),
        Arm("unsloth-compiled", "unsloth", 0, 0, 0, compiled=True),
    )
}


def chosen(names: str | None, quick: bool) -> list[Arm]:
    """Return the arms that `--arms` names, or those of a quick or a full run."""
    if names is None:
        return [arm for arm in _ARMS if arm.rows(quick)]
    unknown = [name for name in names.split(",") if name not in ARMS]
    if unknown:
        raise SystemExit(f"no arm is called {unknown[0]!r}; there are {', '.join(ARMS)}")
    return [ARMS[name] for name in names.split(",")]
