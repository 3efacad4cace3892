"""The memory of a training step, foreseen, and what is done where it would not fit.

    peak bytes of a tree = a + b T        T: nodes of the tree

Attention keeps no more than FEW_KEYS scores of a node. A rough b is enough where there is plenty of
memory; else it is measured on a short sequence. Where that is too much, two things are done, in
this order, neither of which changes the gradient:

1. fewer sequences run at once, which costs little: some sharing, and less full products;
2. a tree that is still too large, such as one long sequence, keeps only the inputs of so many of
   its lowest blocks as it takes, and these run again in backward: up to a third more arithmetic.

A run that goes on has the trees of its first part, which decide its last bits; there blocks are run
again first. Blocks that run again change no bit, so they are counted anew in every process.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from swlora.adapters.methods import trainable_parameters
from swlora.data.prefix_tree import count_group_nodes
from swlora.data.token_sequences import Ints, TokenSequences
from swlora.disk_space import size
from swlora.kernels.head_loss import CHUNK_ROWS
from swlora.kernels.tree_layout import FEW_KEYS
from swlora.memory import kept_for_steps
from swlora.processes import gathered
from swlora.training.live_bytes import LiveBytes
from swlora.training.schedule import Schedule
from swlora.training.step import TreeStep

LEAST_NODES = 64  # that are run at once, as of --row-tokens
MEASURED_NODES = 384
RESIDENT = 1.4  # what a process held over what its tensors took: measured 1.2 to 1.47
MARGIN = 1.5  # of the rough formula
# Copies of weights save the same time in every product, however many rows it has: 1.15 times the
# rate with 511 nodes and 1.08 with 1,022 (1.1 B), 1.00 with 1,600 (135 M). From here on, less than
# a tenth is gained; from TOO_MANY_NODES on nothing that would be worth the memory.
MANY_NODES, TOO_MANY_NODES = 768, 1280
CHEAP_COPIES_BYTES = 1 << 30  # twice those of the embedded model


@dataclass(frozen=True)
class StepMemory:
    """a and b of the formula above, in bytes of tensors."""

    constant: float
    node: float

    def peak_bytes(self, n_nodes: int) -> int:
        """Return the resident bytes that a tree of so many nodes makes."""
        return int(RESIDENT * (self.constant + self.node * n_nodes))

    def most_nodes(self, room_bytes: int) -> int:
        """Return the nodes of the largest tree that fits; 0 or less where none does."""
        return int((room_bytes / RESIDENT - self.constant) / self.node)


def rough_memory(step: TreeStep) -> StepMemory:
    """Return more than a step takes, from the model's sizes alone."""
    rough = rough_memory_of(step.base_model.config, step.walk.n_suffix, _value_bytes(step))
    return replace(rough, constant=rough.constant + _Gathered.of(step).most_bytes)


def rough_memory_of(config: Any, n_with_graph: int, value_bytes: int) -> StepMemory:
    """Return more than a step takes of a model that need not be there.

    `config` is that of transformers, `n_with_graph` the number of blocks from the lowest adapted
    one on, `value_bytes` the size of a value in the model's dtype.
    """
    width = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * width)
    inner *= int(getattr(config, "num_experts_per_tok", None) or 1)
    values = MARGIN * (8 * width + 4 * inner)
    logits = 4 * 4 * CHUNK_ROWS * int(config.vocab_size)
    per_node = value_bytes * (n_with_graph + 1) * values
    return StepMemory(logits, per_node + 2 * _scores_bytes(config, n_with_graph, value_bytes))


def measured_memory(step: TreeStep, *, n_recomputed: int = 0) -> StepMemory:
    """Return what forward and backward of a short sequence took; the gradients are dropped.

    Its nodes need not keep all scores that those of another tree do. `n_recomputed` blocks keep
    their input alone.
    """
    n_most = int(getattr(step.base_model.config, "max_position_embeddings", None) or 1 << 20)
    n_nodes = max(1, min(MEASURED_NODES, n_most - 1))
    n_kept = max(1, step.walk.n_suffix - n_recomputed)  # one is run again at a time
    scores = _scores_bytes(step.base_model.config, n_kept, _value_bytes(step))
    weights, peak_bytes = _Gathered.of(step), _measured_peak(step, n_nodes, n_recomputed)
    own_bytes = peak_bytes - weights.counted_bytes
    return StepMemory(weights.most_bytes, own_bytes / n_nodes + scores)


@dataclass(frozen=True)
class _Gathered:
    """The bytes of the weights that are whole in a step though they are sharded; else 0."""

    block: int = 0  # the largest
    head: int = 0

    @classmethod
    def of(cls, step: TreeStep) -> "_Gathered":
        if not step.is_sharded:
            return cls()
        anatomy = step.walk.anatomy
        blocks = [sum(p.nbytes for p in block.parameters()) for block in anatomy.blocks]
        return cls(max(blocks), anatomy.head.get_parameter("weight").nbytes)

    @property
    def most_bytes(self) -> int:
        """At one moment, at the most: a block while FSDP2 gathers the next and copies it once."""
        return 3 * self.block + self.head

    @property
    def counted_bytes(self) -> int:
        """What is surely in a measured peak: what arrives of a block, or the head."""
        return min(self.block, self.head)


def _scores_bytes(config: Any, n_kept: int, value_bytes: int) -> float:
    """Return the most bytes of scores that so many blocks keep of a node."""
    return n_kept * value_bytes * int(config.num_attention_heads) * FEW_KEYS


def _value_bytes(step: TreeStep) -> int:
    return int(step.base_model.dtype.itemsize)


def _measured_peak(step: TreeStep, n_nodes: int, n_recomputed: int) -> int:
    """Return the most bytes of tensors while a sequence with so many nodes is run."""
    sequence = TokenSequences.from_lists([([1], [1] * n_nodes)])
    trial = TreeStep(step.peft_model, sequence, label_smoothing=step.label_smoothing)
    trial.n_recomputed = lambda _nodes: n_recomputed
    parameters = trainable_parameters(step.peft_model).values()
    live = LiveBytes()
    if step.is_sharded:
        trial([np.array([0])])  # FSDP2 makes at its first step what it fills and frees from then on
    with live:
        trial([np.array([0])])
    trial.close()
    for parameter in parameters:
        parameter.grad = None
    peaks: list[int] = gathered(live.peak_bytes)
    return max(peaks)  # all processes decide by the same number


@dataclass(frozen=True)
class Recomputing:
    """How many of the blocks run again in backward, so that a tree fits into the room in bytes.

    Every block more saves as much, or the first ones more than that.
    """

    n_blocks: int
    kept: StepMemory  # where none runs again
    recomputed: StepMemory  # where all do
    room_bytes: int

    def __call__(self, n_nodes: int) -> int:
        """Return the number of blocks for a tree with so many nodes."""
        excess = self.kept.peak_bytes(n_nodes) - self.room_bytes
        if excess <= 0:
            return 0
        saved = max(1, self._saved_bytes(n_nodes))
        return min(self.n_blocks, -(-excess * self.n_blocks // saved))

    def peak_bytes(self, n_nodes: int) -> int:
        """Return the resident bytes that a tree of so many nodes makes then."""
        saved = self(n_nodes) * self._saved_bytes(n_nodes) // self.n_blocks
        return self.kept.peak_bytes(n_nodes) - saved

    def _saved_bytes(self, n_nodes: int) -> int:
        return self.kept.peak_bytes(n_nodes) - self.recomputed.peak_bytes(n_nodes)


def fit_into_memory(
    step: TreeStep,
    schedule: Schedule,
    limit_bytes: int,
    say: Callable[[str], None],
    *,
    keeps_trees: bool = False,
) -> int:
    """Let a step whose largest tree would exceed the limit take less; return what it takes then.

    The limit is for tensors, gradients and the optimizer's two moments. The gradients are the same.
    `keeps_trees`: where it suffices, blocks run again in backward and the trees stay as they are.
    Random generators move on. A sequence that does not fit by itself is said and run.
    """
    trained = trainable_parameters(step.peft_model).values()
    room = max(0, limit_bytes - 3 * sum(p.nbytes for p in trained))
    largest = _largest_tree(step, schedule)
    if (needed := rough_memory(step).peak_bytes(largest)) <= room:
        return needed
    with kept_for_steps(None):  # no copies of weights for the trial
        kept = measured_memory(step)
    if not keeps_trees and kept.peak_bytes(largest) > room:
        largest = _cut_trees(step, schedule, kept, room, say)
    if (needed := kept.peak_bytes(largest)) <= room:
        return needed
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
    return needed


def _cut_trees(
    step: TreeStep,
    schedule: Schedule,
    memory: StepMemory,
    room: int,
    say: Callable[[str], None],
) -> int:
    """Let a step run so few nodes at once that they fit; return those of its largest tree then."""
    asked = _largest_tree(step, schedule)
    needed = size(memory.peak_bytes(asked))
    step.most_nodes = max(LEAST_NODES, memory.most_nodes(room))
    say(
        f"memory: a step over {asked:,} tokens at once would take {needed}, and there are "
        f"{size(room)}; at most {step.most_nodes:,} are run at once, with the same gradient"
    )
    return _largest_tree(step, schedule)


def copies_worth_bytes(step: TreeStep, schedule: Schedule) -> int | None:
    """Return the most bytes of copies that pay for themselves in a step; None: any number.

    Where trees are large few of them do, the head's first, whose products are narrow whatever the
    tree; where they are larger still, none.
    """
    n_nodes = _nodes(step, schedule).mean()
    if n_nodes >= TOO_MANY_NODES:
        return 0
    return CHEAP_COPIES_BYTES if n_nodes >= MANY_NODES else None


def _largest_tree(step: TreeStep, schedule: Schedule) -> int:
    return int(_nodes(step, schedule).max())


def _nodes(step: TreeStep, schedule: Schedule) -> Ints:
    """Return the nodes of every tree of the first epoch."""
    parts = [ids for groups in schedule.epoch(0) for ids in step.parts(groups)]
    return count_group_nodes(step.sequences, parts)
