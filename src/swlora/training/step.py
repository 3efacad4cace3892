"""The fast training step: prefix trees, frozen prefix, chunked head loss; equal to the plain step.

tree -> hidden state at the lowest adapted block (no graph, cached) -> the blocks above it
    -> the scored nodes' final state -> loss and its gradient over the frozen head
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from swlora.adapters.methods import adapted_layers, trainable_parameters
from swlora.config import TrainSpec
from swlora.data.prefix_tree import PrefixTree, build_tree
from swlora.data.steps import cut_group
from swlora.data.token_sequences import TokenSequences
from swlora.errors import RunFailedError, UserError
from swlora.kernels.forwards import fast_forwards, refresh
from swlora.kernels.head_loss import Targets, head_loss
from swlora.kernels.linear.frozen import FrozenLinear
from swlora.kernels.patched_forwards import patched_forwards
from swlora.kernels.recomputed import recomputing
from swlora.kernels.tree_layout import TreeLayout
from swlora.kernels.tree_walk import TreeWalk
from swlora.loss_sum import LossSum
from swlora.training.frozen_prefix import PrefixCache
from swlora.training.plain import PlainStep

PrefixSource = Callable[[PrefixTree, TreeLayout], Tensor]


def make_step(
    peft_model: Any,
    sequences: TokenSequences,
    spec: TrainSpec,
    say: Callable[[str], None],
    kept_bytes: int = 0,
) -> "TreeStep | PlainStep":
    """Return the step function that `spec.engine` names; `auto` is tree wherever it works.

    The caller closes it. A prefix cache leaves `kept_bytes` of its disk free. Raises UserError
    where trees are asked for and the family cannot run them.
    """
    step = TreeStep(peft_model, sequences, label_smoothing=spec.label_smoothing, say=say)
    family = step.walk.anatomy.family
    if spec.engine == "tree" and not family.has_attention_interface:
        name = family.model_types[0]
        raise UserError(f"{name} models cannot run prefix trees; use --engine plain")
    if spec.engine == "plain" or not family.has_attention_interface:
        return PlainStep(peft_model, sequences, label_smoothing=spec.label_smoothing)
    if spec.cache_gb and step.walk.cut > 0 and _one_side(step, sequences, say):
        step.prefix_source = PrefixCache(
            step.walk, sequences, limit_gb=spec.cache_gb, kept_bytes=kept_bytes, say=say
        )
    return step


class TreeStep:
    """Loss and gradient of the sequences of one optimizer step, over their trees."""

    def __init__(
        self,
        peft_model: Any,
        sequences: TokenSequences,
        *,
        label_smoothing: float = 0.0,
        say: Callable[[str], None] = print,
    ) -> None:
        self.peft_model = peft_model
        self.base_model = peft_model.get_base_model()
        self.sequences = sequences
        self.label_smoothing = label_smoothing
        walk = self.walk = TreeWalk(self.base_model, adapted_layers(peft_model)[0])
        self.prefix_source: PrefixSource = lambda _tree, layout: walk.prefix(layout)  # no cycle
        self._say = say
        self.most_nodes: int | None = None  # of a tree: larger groups are cut
        self._n_parts = 1  # every group is run in so many parts, doubled when memory runs out

    def __call__(self, groups: Sequence[np.ndarray]) -> LossSum:
        """Add the gradient of the summed loss of the step; return that loss."""
        while True:
            try:
                return self._run(self.parts(groups))
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                self._halve(groups)

    def parts(self, groups: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Cut groups into what is run: sequences that may run together, as many as memory holds."""
        rotary, lengths = self.walk.rotary, self.sequences.lengths
        if (most := self.most_nodes) is not None:
            groups = [part for ids in groups for part in cut_group(self.sequences, ids, most)]
        together = [part for ids in groups for part in rotary.sides(ids, lengths)]
        return [p for ids in together for p in np.array_split(ids, self._n_parts) if len(p)]

    def _run(self, parts: Sequence[np.ndarray]) -> LossSum:
        total = LossSum()
        refresh(self._forwards)
        with patched_forwards(self._forwards):
            for ids in parts:
                tree = build_tree(self.sequences, ids)
                layout = TreeLayout(tree, self.base_model.device)
                entry = self.prefix_source(tree, layout)
                with recomputing():
                    hidden = self.walk.suffix(layout, entry)
                loss = tree_nats(self.walk, tree, hidden, self.label_smoothing)
                torch.autograd.backward(loss)
                total += LossSum(float(loss.detach()), tree.n_target_tokens)
        return total

    @cached_property
    def _forwards(self) -> dict[nn.Module, Callable[..., Tensor]]:
        """The fast forwards, made before the first step and used in all of them."""
        forwards = fast_forwards(self.peft_model)
        head = forwards.get(self.walk.anatomy.head)
        if isinstance(head, FrozenLinear):
            head.reserve()  # it is read once a chunk, the blocks' weights once a tree
        return forwards

    def close(self) -> None:
        """Let go of copies of weights, and of the prefix cache's files, which stay for later."""
        self.__dict__.pop("_forwards", None)
        if isinstance(self.prefix_source, PrefixCache):
            self.prefix_source.close()

    def _halve(self, groups: Sequence[np.ndarray]) -> None:
        if all(len(ids) <= self._n_parts for ids in groups):
            raise RunFailedError("a single sequence does not fit into memory; --truncate it")
        self._n_parts *= 2
        for parameter in trainable_parameters(self.peft_model).values():
            parameter.grad = None
        self._say(f"memory ran out: rows are run in {self._n_parts} parts from here on")


def _one_side(step: TreeStep, sequences: TokenSequences, say: Callable[[str], None]) -> bool:
    """Say whether every prefix has one state, however long the sequence is that it belongs to."""
    if len(step.parts([np.arange(len(sequences))])) == 1:
        return True
    limits = " and ".join(map(str, step.walk.rotary.limits_tokens))
    say(
        f"no prefix cache: this model's rotary frequencies change beyond {limits} tokens, and the "
        "data have sequences on both sides"
    )
    return False


def tree_nats(walk: TreeWalk, tree: PrefixTree, hidden: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the summed loss in nats of a tree from the decoder's final state (1, T, D)."""
    scored, targets = scored_targets(tree, hidden.device)
    head: Any = walk.anatomy.head
    cap = walk.anatomy.logit_cap
    return head_loss(hidden[0, scored], head, targets, smoothing=smoothing, cap=cap)


def scored_targets(tree: PrefixTree, device: torch.device) -> tuple[Tensor, Targets]:
    """Return (nodes that are scored (N,), their targets with rows numbered 0 to N - 1)."""
    scored, rows = np.unique(tree.target_position, return_inverse=True)
    row_weights = np.bincount(rows, weights=tree.target_weight).astype(np.float32)
    targets = Targets(
        rows=torch.from_numpy(rows).to(device),
        ids=torch.from_numpy(tree.target_id).to(device),
        weights=torch.from_numpy(tree.target_weight).to(device),
        row_weights=torch.from_numpy(row_weights).to(device),
    )
    return torch.from_numpy(scored).to(device), targets


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Say whether memory ran out; torch has no type for that on a CPU, so its words are read."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
