"""The fast training step: prefix trees, frozen prefix, chunked head loss; equal to the plain step.

tree -> hidden state at the lowest adapted block (no graph, cached) -> the blocks above it
    -> the scored nodes' final state -> loss and its gradient over the frozen head
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from swlora.adapters.methods import adapted_layers, trainable_parameters
from swlora.config import TrainSpec
from swlora.data.ahead import worked_ahead
from swlora.data.prefix_tree import PrefixTree, build_tree
from swlora.data.steps import cut_group
from swlora.data.token_sequences import TokenSequences
from swlora.errors import RunFailedError, UserError
from swlora.kernels.cuda_attention import news as attention_news
from swlora.kernels.forwards import fast_forwards, refresh
from swlora.kernels.head_loss import Targets, head_loss
from swlora.kernels.host_arrays import on_device
from swlora.kernels.linear.frozen import FrozenLinear
from swlora.kernels.patched_forwards import patched_forwards
from swlora.kernels.recomputed import recomputing
from swlora.kernels.tree_layout import TreeLayout
from swlora.kernels.tree_walk import TreeWalk
from swlora.loss_sum import LossSum
from swlora.memory import is_out_of_memory
from swlora.models.sharded_weight import has_sharded
from swlora.training.device_update import DeviceLoss
from swlora.training.frozen_prefix import PrefixCache
from swlora.training.necessary_work import FlopCounter, Work
from swlora.training.plain import PlainStep
from swlora.training.schedule import Step

PrefixSource = Callable[[PrefixTree, TreeLayout], Tensor | None]
R = TypeVar("R")
_LaidOut = tuple[PrefixTree, TreeLayout]
_LEAST = TokenSequences.from_lists([([0], [0])])  # the tree that is run for nothing


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
    if step.is_sharded:
        if spec.cache_gb and step.walk.cut > 0:
            say("no prefix cache: --shard runs all layers of a tree at once")
        return step
    if spec.engine == "plain" or not family.has_attention_interface:
        return PlainStep(peft_model, sequences, label_smoothing=spec.label_smoothing)
    if spec.cache_gb and step.walk.cut > 0 and has_one_side(step, sequences, say):
        step.prefix_source = PrefixCache(
            step.walk, sequences, limit_gb=spec.cache_gb, kept_bytes=kept_bytes, say=say
        )
    return step


class _TreesAhead(NamedTuple):
    """The trees of a step, made when every group was run in `n_parts` parts."""

    groups: Sequence[np.ndarray]
    n_parts: int
    trees: list[_LaidOut]


class TreeStep:
    """Loss and gradient of the sequences of one optimizer step, over their trees."""

    def __init__(
        self,
        peft_model: Any,
        sequences: TokenSequences,
        *,
        label_smoothing: float = 0.0,
        say: Callable[[str], None] = print,
        cut: int | None = None,  # the lowest block with a graph; None: the lowest adapted one
    ) -> None:
        self.peft_model = peft_model
        self.base_model = peft_model.get_base_model()
        self.sequences = sequences
        self.label_smoothing = label_smoothing
        self.is_sharded = has_sharded(self.base_model)
        cut = adapted_layers(peft_model)[0] if cut is None else cut
        walk = self.walk = TreeWalk(self.base_model, cut)
        self.prefix_source: PrefixSource = lambda _tree, layout: walk.prefix(layout)  # no cycle
        if self.is_sharded:
            self.prefix_source = lambda *_: None  # every block is gathered once in a tree
        self._say = say
        self.most_nodes: int | None = None  # of a tree: larger groups are cut
        self.n_recomputed: Callable[[int], int] = lambda _nodes: 0  # blocks, of a tree so large
        self.work, self._flops = Work(), FlopCounter(walk.anatomy, walk.cut)
        self._n_parts = 1  # every group is run in so many parts, doubled when memory runs out
        self.works_ahead = self.base_model.device.type == "cuda"  # a CPU has no core to spare
        self._trees_ahead: _TreesAhead | None = None

    def __call__(self, groups: Sequence[np.ndarray], n_trees: int = 0) -> LossSum:
        """Add the gradient of the summed loss of the step; return that loss.

        `n_trees` are run at least, the missing ones for nothing: processes that share weights must
        run as many as each other.
        """
        return self.fitted(groups, lambda: self._run(self._trees(groups), n_trees))

    def fitted(self, groups: Sequence[np.ndarray], run: Callable[[], R]) -> R:
        """Return what `run` makes of the parts of groups, which are more where memory runs out.

        Raises RunFailedError where it has no room for a single sequence.
        """
        while True:
            try:
                return run()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(groups)

    def parts(self, groups: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Cut groups into what is run: sequences that may run together, as many as memory holds."""
        rotary, lengths = self.walk.rotary, self.sequences.lengths
        if (most := self.most_nodes) is not None:
            groups = [part for ids in groups for part in cut_group(self.sequences, ids, most)]
        together = [part for ids in groups for part in rotary.sides(ids, lengths)]
        return [p for ids in together for p in np.array_split(ids, self._n_parts) if len(p)]

    def _run(self, trees: Iterable[_LaidOut], n_trees: int) -> LossSum:
        losses: list[tuple[Tensor, float]] = []
        refresh(self.forwards)
        with patched_forwards(self.forwards):
            for tree, layout in trees:
                loss = self._nats(tree, layout)
                torch.autograd.backward(loss)
                losses.append((loss.detach(), tree.n_target_tokens))
            while len(losses) < n_trees:
                loss = 0 * self._nats(*self._laid_out(_LEAST, np.array([0])))
                torch.autograd.backward(loss)
                losses.append((loss.detach(), 0))
        self._say_attention()
        return _summed(losses)

    def _nats(self, tree: PrefixTree, layout: TreeLayout) -> Tensor:
        """Return the summed loss of a tree, with a graph."""
        n_read = self._n_read_trees
        entry = self.prefix_source(tree, layout)
        self._count(tree, prefix_read=self._n_read_trees > n_read)
        with recomputing():
            n_recomputed = self.n_recomputed(layout.n_nodes)
            hidden = self.walk.suffix(layout, entry, n_recomputed=n_recomputed)
        return tree_nats(self.walk, tree, hidden, self.label_smoothing)

    @property
    def _n_read_trees(self) -> int:
        source = self.prefix_source
        return source.n_read_trees if isinstance(source, PrefixCache) else 0

    def _count(self, tree: PrefixTree, *, prefix_read: bool) -> None:
        """Add a tree to the work that is done."""
        work, n_nodes = self.work, len(tree.token_ids)
        n_scored = len(np.unique(tree.target_position))
        flops = self._flops(n_nodes, n_scored, prefix_read=prefix_read)
        work.n_nodes += n_nodes
        work.n_tokens += int(self.sequences.lengths[tree.sequence_ids].sum())
        work.flops = None if flops is None or work.flops is None else work.flops + flops

    @torch.no_grad()
    def try_attention(self, groups: Sequence[np.ndarray]) -> None:
        """Have every block's kernel of attention chosen, on the first tree of a step."""

        def run() -> None:
            _, layout = self._laid_out(self.sequences, self.parts(groups)[0])
            self.walk.whole(layout)

        self.fitted(groups, run)
        self._say_attention()

    def _say_attention(self) -> None:
        for line in attention_news():
            self._say(line)

    def _trees(self, groups: Sequence[np.ndarray]) -> Iterable[_LaidOut]:
        """Return the trees of a step; one by one, where they were not made ahead."""
        ahead, self._trees_ahead = self._trees_ahead, None
        if ahead and ahead.groups is groups and ahead.n_parts == self._n_parts:
            return ahead.trees
        return (self._laid_out(self.sequences, ids) for ids in self.parts(groups))

    def ahead(self, steps: Iterator[Step]) -> Iterator[Step]:
        """Yield the steps; on a GPU the trees of the next one are made while it computes."""
        if not self.works_ahead:
            yield from steps
            return
        for groups, trees_ahead in worked_ahead(steps, self._make_ahead):
            self._trees_ahead = trees_ahead
            yield groups

    def _make_ahead(self, groups: Step) -> _TreesAhead:
        n_parts = self._n_parts
        device = self.base_model.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            trees = [self._laid_out(self.sequences, ids) for ids in self.parts(groups)]
        return _TreesAhead(groups, n_parts, trees)

    def _laid_out(self, sequences: TokenSequences, ids: np.ndarray) -> _LaidOut:
        tree = build_tree(sequences, ids)
        return tree, TreeLayout(tree, self.base_model.device)

    @cached_property
    def forwards(self) -> dict[nn.Module, Callable[..., Tensor]]:
        """The fast forwards, made before the first step and used in all of them."""
        forwards = fast_forwards(self.peft_model)
        head = forwards.get(self.walk.anatomy.head)
        if isinstance(head, FrozenLinear):
            head.reserve()  # it is read once a chunk, the blocks' weights once a tree
        return forwards

    def close(self) -> None:
        """Let go of copies of weights, and of the prefix cache's files, which stay for later."""
        self.__dict__.pop("forwards", None)
        if isinstance(self.prefix_source, PrefixCache):
            self.prefix_source.close()

    def _halve(self, groups: Sequence[np.ndarray]) -> None:
        if self.is_sharded:  # other processes wait in the middle of the tree
            raise RunFailedError("memory ran out; lower --row-tokens, or start more processes")
        if all(len(ids) <= self._n_parts for ids in groups):
            raise RunFailedError("a single sequence does not fit into memory; --truncate it")
        self._n_parts *= 2
        for parameter in trainable_parameters(self.peft_model).values():
            parameter.grad = None
        parts = f"{self._n_parts} parts from here on"
        self._say(f"memory ran out: what runs at once is cut into {parts}")


def _summed(losses: Sequence[tuple[Tensor, float]]) -> LossSum:
    """Return the sum of losses in nats and their tokens; on a GPU without waiting for it."""
    if losses[0][0].is_cuda:
        nats = torch.stack([nats for nats, _ in losses]).sum(dtype=torch.float64)
        return DeviceLoss(nats, sum(n_tokens for _, n_tokens in losses))
    total = LossSum()
    for nats, n_tokens in losses:
        total += LossSum(float(nats), n_tokens)
    return total


def has_one_side(step: TreeStep, sequences: TokenSequences, say: Callable[[str], None]) -> bool:
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
        rows=on_device(rows, device),
        ids=on_device(tree.target_id, device),
        weights=on_device(tree.target_weight, device),
        row_weights=on_device(row_weights, device),
        host_rows=rows,
    )
    return on_device(scored, device), targets
