"""What is done where a training step would not fit into memory, and what fits where that fails.

Two things are done, in this order, neither of which changes the gradient:

1. fewer sequences run at once, which costs little: some sharing, and less full products;
2. a tree that is still too large, such as one long sequence, keeps only the inputs of so many of
   its lowest blocks as it takes, and these run again in backward: up to a third more arithmetic.

A run that goes on has the trees of its first part, which decide its last bits; there blocks are run
again first. Blocks that run again change no bit, so they are counted anew in every process.
"""

from collections.abc import Callable
from dataclasses import dataclass

from swlora.adapters.methods import trainable_parameters
from swlora.data.prefix_tree import count_group_nodes
from swlora.data.token_sequences import Ints
from swlora.disk_space import size
from swlora.errors import UserError
from swlora.memory import kept_for_steps, steps_limit_bytes
from swlora.training.schedule import Schedule
from swlora.training.step import TreeStep
from swlora.training.step_memory import Recomputing, StepMemory, measured_memory, rough_memory

LEAST_NODES = 64  # that are run at once, as of --row-tokens
# Copies of weights save the same time in every product, however many rows it has: 1.15 times the
# rate with 511 nodes and 1.08 with 1,022 (1.1 B), 1.00 with 1,600 (135 M). From here on, less than
# a tenth is gained; from TOO_MANY_NODES on nothing that would be worth the memory.
MANY_NODES, TOO_MANY_NODES = 768, 1280
CHEAP_COPIES_BYTES = 1 << 30  # twice those of the embedded model


@dataclass(frozen=True)
class Fitted:
    """The nodes of the largest tree that is run, and the resident bytes that it takes.

    `memory` is where no block runs again, `recomputing` None where none does.
    """

    n_nodes: int
    needed_bytes: int
    memory: StepMemory
    recomputing: Recomputing | None = None


def fit_into_memory(
    step: TreeStep,
    schedule: Schedule,
    limit_bytes: int,
    say: Callable[[str], None],
    *,
    keeps_trees: bool = False,
    rough_up_to_bytes: int | None = None,
) -> Fitted:
    """Let a step whose largest tree would exceed the limit take less; return what it takes then.

    The limit is for tensors, gradients and the optimizer's two moments. The gradients are the same.
    `keeps_trees`: where it suffices, blocks run again in backward and the trees stay as they are.
    `rough_up_to_bytes`: a rough figure does up to here, where it fits; None: wherever it fits.
    Random generators move on. A sequence that does not fit by itself is said.
    """
    room = max(0, limit_bytes - 3 * trained_bytes(step))
    largest = int(tree_nodes(step, schedule).max())
    rough = rough_memory(step)
    most = room if rough_up_to_bytes is None else min(room, rough_up_to_bytes)
    if (needed := rough.peak_bytes(largest)) <= most:
        return Fitted(largest, needed, rough)
    with kept_for_steps(None):  # no copies of weights for the trial
        kept = measured_memory(step)
    if not keeps_trees and kept.peak_bytes(largest) > room:
        largest = _cut_trees(step, schedule, kept, room, say)
    if (needed := kept.peak_bytes(largest)) <= room:
        return Fitted(largest, needed, kept)
    n_blocks = step.walk.n_suffix
    with kept_for_steps(None):
        recomputed = measured_memory(step, n_recomputed=n_blocks)
    step.n_recomputed = recomputing = Recomputing(n_blocks, kept, recomputed, room)
    if keeps_trees and recomputing.peak_bytes(largest) > room:
        largest = _cut_trees(step, schedule, recomputed, room, say)
    needed = recomputing.peak_bytes(largest)
    say(
        f"memory: {largest:,} tokens at once would take {size(kept.peak_bytes(largest))}, and "
        f"there are {size(room)}; {recomputing(largest)} of {n_blocks} blocks keep only their "
        f"input and run again in backward, with the same gradient"
    )
    if needed > room and largest > LEAST_NODES:
        say(
            f"memory: the longest sequence takes about {size(needed)}, and there are {size(room)}: "
            "the system may end this; --truncate makes it shorter"
        )
    return Fitted(largest, needed, kept, recomputing)


def fit_trial(step: TreeStep, schedule: Schedule, say: Callable[[str], None]) -> None:
    """Let the steps of a trial run trees that fit into memory; on a GPU they are left alone.

    Random generators may move on.
    """
    if step.base_model.device.type == "cpu":
        fit_into_memory(step, schedule, steps_limit_bytes(), say)


def check_fits(step: TreeStep, fitted: Fitted, limit_bytes: int, whose: str) -> None:
    """Raise UserError where a step takes more than the limit all the same, with what would fit.

    `limit_bytes` is for the same as in `fit_into_memory`; `whose` says in words what allows it.
    """
    own_bytes = 3 * trained_bytes(step)
    needed = fitted.needed_bytes + own_bytes
    if needed <= limit_bytes:
        return
    fits = [
        *_shorter_rows(fitted, limit_bytes - own_bytes),
        *_fewer_layers(step, fitted, limit_bytes),
    ]
    raise UserError(
        f"a step over {fitted.n_nodes:,} tokens, the fewest that can run at once, takes about "
        f"{size(needed)} with its gradients and optimizer, and {whose} {size(limit_bytes)}; "
        + (f"what would fit: {' or '.join(fits)}" if fits else "not even one layer would fit")
    )


def _shorter_rows(fitted: Fitted, room_bytes: int) -> list[str]:
    """Say how long rows may be, where they are what is too long."""
    memory = fitted.recomputing.recomputed if fitted.recomputing else fitted.memory
    n_nodes = memory.most_nodes(room_bytes)
    if fitted.n_nodes <= LEAST_NODES or n_nodes < LEAST_NODES:
        return []
    return [f"rows of up to {n_nodes + 1:,} tokens"]


def _fewer_layers(step: TreeStep, fitted: Fitted, limit_bytes: int) -> list[str]:
    """Say how many of the last layers may be adapted, by what a step over them takes."""
    n_blocks, trained = step.walk.n_suffix, trained_bytes(step)
    for n_last in sorted({n_blocks * k // 8 for k in (1, 2, 4, 6)} | {1}, reverse=True):
        if not 0 < n_last < n_blocks:
            continue
        with kept_for_steps(None):
            memory = measured_memory(step, n_suffix=n_last)
        needed = memory.peak_bytes(fitted.n_nodes)
        if needed + 3 * trained * n_last // n_blocks <= limit_bytes:
            return [f"--layers last:{n_last}"]
    return []


def _cut_trees(
    step: TreeStep,
    schedule: Schedule,
    memory: StepMemory,
    room: int,
    say: Callable[[str], None],
) -> int:
    """Let a step run so few nodes at once that they fit; return those of its largest tree then."""
    asked = int(tree_nodes(step, schedule).max())
    needed = size(memory.peak_bytes(asked))
    step.most_nodes = max(LEAST_NODES, memory.most_nodes(room))
    say(
        f"memory: a step over {asked:,} tokens at once would take {needed}, and there are "
        f"{size(room)}; at most {step.most_nodes:,} are run at once, with the same gradient"
    )
    return int(tree_nodes(step, schedule).max())


def copies_worth_bytes(step: TreeStep, schedule: Schedule) -> int | None:
    """Return the most bytes of copies that pay for themselves in a step; None: any number.

    Where trees are large few of them do, the head's first, whose products are narrow whatever the
    tree; where they are larger still, none.
    """
    n_nodes = tree_nodes(step, schedule).mean()
    if n_nodes >= TOO_MANY_NODES:
        return 0
    return CHEAP_COPIES_BYTES if n_nodes >= MANY_NODES else None


def trained_bytes(step: TreeStep) -> int:
    """Return the bytes of the trained weights."""
    return sum(p.nbytes for p in trainable_parameters(step.peft_model).values())


def tree_nodes(step: TreeStep, schedule: Schedule) -> Ints:
    """Return the nodes of every tree of the first epoch."""
    parts = [ids for groups in schedule.epoch(0) for ids in step.parts(groups)]
    return count_group_nodes(step.sequences, parts)
