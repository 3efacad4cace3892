"""The memory of a training step, foreseen.

    peak bytes of a tree = a + b T        T: nodes of the tree

Attention keeps no more than FEW_KEYS scores of a node. A rough b is enough where there is plenty of
memory; else it is measured on two short sequences. What is done where a step would not fit is in
`fitting`.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from swlora.adapters.methods import trainable_parameters
from swlora.data.prefix_tree import build_tree
from swlora.data.token_sequences import TokenSequences
from swlora.kernels.forwards import fast_forwards
from swlora.kernels.head_loss import CHUNK_ROWS
from swlora.kernels.patched_forwards import patched_forwards
from swlora.kernels.tree_layout import FEW_KEYS, TreeLayout
from swlora.processes import gathered
from swlora.training.live_bytes import LiveBytes
from swlora.training.step import TreeStep, tree_nats

MEASURED_NODES = 384
RESIDENT = 1.4  # what a process held over what its tensors took: measured 1.2 to 1.47
MARGIN = 1.5  # of the rough formula


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


def measured_memory(
    step: TreeStep, *, n_recomputed: int = 0, n_suffix: int | None = None
) -> StepMemory:
    """Return what forward and backward of two short sequences took; the gradients are dropped.

    Their nodes need not keep all scores that those of another tree do. `n_recomputed` blocks keep
    their input alone; `n_suffix` blocks have a graph, by default those from the lowest adapted one
    on.
    """
    n_suffix = step.walk.n_suffix if n_suffix is None else n_suffix
    short, n_nodes = _short_sequences(step)
    n_kept = max(1, n_suffix - n_recomputed)  # one is run again at a time
    scores = _scores_bytes(step.base_model.config, n_kept, _value_bytes(step))
    weights, peak_bytes = _Gathered.of(step), _measured_peak(step, short, n_recomputed, n_suffix)
    own_bytes = peak_bytes - weights.counted_bytes
    return StepMemory(weights.most_bytes, own_bytes / n_nodes + scores)


def measured_without_graph(step: TreeStep) -> StepMemory:
    """Return what all blocks and the loss take without a gradient, one block's states at a time."""
    short, n_nodes = _short_sequences(step)
    tree, live = build_tree(short, np.arange(len(short))), LiveBytes()
    layout = TreeLayout(tree, step.base_model.device)
    with torch.inference_mode(), patched_forwards(fast_forwards(step.peft_model)), live:
        tree_nats(step.walk, tree, step.walk.whole(layout))
    return StepMemory(0, live.peak_bytes / n_nodes)


def head_bytes(step: TreeStep) -> int:
    """Return the bytes of a whole chunk of logits."""
    return CHUNK_ROWS * int(step.base_model.config.vocab_size) * _value_bytes(step)


def _short_sequences(step: TreeStep) -> tuple[TokenSequences, int]:
    """Return two sequences that are measured, and their nodes.

    They share nothing, and neither is a long path, whose attention takes less memory in float32.
    """
    n_most = int(getattr(step.base_model.config, "max_position_embeddings", None) or 1 << 20)
    n_nodes = max(1, min(MEASURED_NODES // 2, n_most - 1))
    pairs = [([first], [first] * n_nodes) for first in (0, 1)]
    return TokenSequences.from_lists(pairs), 2 * n_nodes


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


def _measured_peak(step: TreeStep, short: TokenSequences, n_recomputed: int, n_suffix: int) -> int:
    """Return the most bytes of tensors while sequences are run."""
    cut, groups = step.walk.anatomy.n_layers - n_suffix, [np.arange(len(short))]
    trial = TreeStep(step.peft_model, short, label_smoothing=step.label_smoothing, cut=cut)
    trial.n_recomputed = lambda _nodes: n_recomputed
    parameters = trainable_parameters(step.peft_model).values()
    live = LiveBytes()
    if step.is_sharded:
        trial(groups)  # FSDP2 makes at its first step what it fills and frees from then on
    with live:
        trial(groups)
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
