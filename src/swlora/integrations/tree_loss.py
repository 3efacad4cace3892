"""The loss of a batch over the prefix tree of its rows: `model(...).loss` for less work.

loss = sum over labels of -log p(label | its row up to there) / (labels, or num_items_in_batch)
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from swlora.adapters.methods import adapted_modules
from swlora.data.prefix_tree import build_tree
from swlora.errors import UserError
from swlora.integrations.batch_rows import BatchRows, read_rows, refuse
from swlora.integrations.exactness import (
    anatomy_of,
    base_of,
    check_length,
    check_mode,
    check_model,
    check_processes,
    in_weights_dtype,
)
from swlora.kernels.forwards import fast_forwards, has_hooks, refresh, uncalled
from swlora.kernels.patched_forwards import patched_forwards
from swlora.kernels.recomputed import recomputing
from swlora.kernels.tree_layout import TreeLayout
from swlora.kernels.tree_walk import TreeWalk
from swlora.training.step import tree_nats

_ATTRIBUTE = "_swlora_tree_loss"  # of a model, for what is kept from one call to the next
# What transformers' collators add about packed rows; positions say it, too.
_OF_PACKED = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
_WITHOUT_EFFECT = {"use_cache", "return_dict"}


def tree_loss(
    model: Any,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **others: Any,
) -> Tensor:
    """Return the loss of a batch, equal to `model(...).loss`, with what its rows share done once.

    `model` is a model of transformers, mostly with an adapter of PEFT. input_ids, labels: (B, T)
    integers, labels of -100 are not scored; attention_mask: (B, T), 1 is a token and 0 padding, on
    either side. Packed rows have position_ids (B, T) that begin again and no mask; what
    DataCollatorWithFlattening gives beside them is taken too. They never see each other, which in
    transformers needs `use_cache=False`. num_items_in_batch: divide by it instead of by the labels
    of this batch, as a Trainer does over accumulated batches. Returns a scalar, float32 at least,
    in nats, with a graph where gradients are on: `backward()` gives every gradient of `model(...)`.

    Raises UserError, which names the plain way, for what would not be the same: an unknown family,
    dropout, a mask that is no padding, labels that are other tokens, another loss, gradient
    checkpointing, weights that are trained outside the decoder's blocks, hooks on modules that a
    tree does not call, several processes outside DistributedDataParallel's forward.

        loss = swlora.tree_loss(model, **batch)
        loss.backward()
    """
    base = base_of(model)
    _check_others(others, position_ids)
    check_processes(base)
    check_mode(model, base)
    engine = _engine_of(model, base)
    model_type = base.config.model_type
    rows = read_rows(input_ids, labels, attention_mask, position_ids, model_type=model_type)
    check_length(base, rows.n_positions)
    divisor = _divisor(rows, num_items_in_batch)
    if rows.sequences is None:  # the labels are in other batches of the step
        return sum((0 * p.sum() for p in engine.trained), torch.zeros((), device=base.device))
    with in_weights_dtype(base):
        loss = engine.nats(rows)
    return loss / (divisor.to(loss.device) if isinstance(divisor, Tensor) else divisor)


def release(model: Any) -> None:
    """Let go of what `tree_loss` keeps for a model: copies of weights in the kernels' layout."""
    vars(base_of(model)).pop(_ATTRIBUTE, None)


class _Engine:
    """The walk over a model's trees and its fast forwards, for one state of its adapters."""

    def __init__(self, model: Any, base: Any, state: tuple[Any, ...]) -> None:
        check_model(model)
        self.state = state
        self.trained = [p for p in model.parameters() if p.requires_grad]
        anatomy = anatomy_of(base)
        has_trained = [any(p.requires_grad for p in b.parameters()) for b in anatomy.blocks]
        self._walk = TreeWalk(base, has_trained.index(True) if any(has_trained) else 0)
        # Rotary angles matter by their differences alone; learned positions do not.
        self._is_rotary = any(hasattr(module, "rope_type") for module in base.modules())
        self._forwards: dict[nn.Module, Callable[..., Tensor]] = fast_forwards(model)
        inside = [part for m, fast in self._forwards.items() for part in uncalled(m, fast)]
        wrappers = [] if model is base else [model, model.base_model]
        skipped = {*wrappers, base, base.get_output_embeddings(), *inside}
        named = [(name or "the model", m) for name, m in model.named_modules()]
        self._uncalled = [(name, m) for name, m in named if m in skipped]

    def nats(self, rows: BatchRows) -> Tensor:
        """Return the summed loss of the rows in nats."""
        assert rows.sequences is not None
        for name, module in self._uncalled:
            if has_hooks(module):
                refuse(f"{name} has hooks, and trees do not call it as a module")
        first = np.zeros_like(rows.first_positions) if self._is_rotary else rows.first_positions
        refresh(self._forwards)
        with patched_forwards(self._forwards):
            return torch.stack(
                [self._tree_nats(rows, first, int(p)) for p in np.unique(first)]
            ).sum()

    def _tree_nats(self, rows: BatchRows, first: np.ndarray, position: int) -> Tensor:
        assert rows.sequences is not None
        tree = build_tree(rows.sequences, np.flatnonzero(first == position))
        layout = TreeLayout(tree, self._walk.base_model.device)
        layout.position_ids = layout.position_ids + position
        # By the longest of the batch transformers chooses the rotary frequencies of all rows.
        layout.sequence_tokens = rows.n_positions, rows.n_positions
        with recomputing():
            hidden = self._walk.suffix(layout, None)
        return tree_nats(self._walk, tree, hidden)


class _Kept:
    """What hangs on a model and is no part of it: copies and pickles of the model have none."""

    def __init__(self, engine: _Engine | None = None) -> None:
        self.engine = engine

    def __deepcopy__(self, _memo: Any) -> "_Kept":
        return _Kept()

    def __reduce__(self) -> tuple[type["_Kept"], tuple[()]]:
        return _Kept, ()


def _engine_of(model: Any, base: Any) -> _Engine:
    """Return the engine of a model, made anew where another adapter or parameter is active."""
    state = _state(model)
    kept = vars(base).get(_ATTRIBUTE)
    if kept is None or kept.engine is None or kept.engine.state != state:
        vars(base).pop(_ATTRIBUTE, None)  # first, so that copies of weights are not there twice
        kept = vars(base)[_ATTRIBUTE] = _Kept(_Engine(model, base, state))
    return kept.engine  # type: ignore[no-any-return]


def _state(model: Any) -> tuple[Any, ...]:
    """Return what the fast forwards depend on besides the weights' numbers."""
    trained = tuple((id(p), p.requires_grad, p.dtype) for p in model.parameters())
    return trained, tuple(map(adapter_state, adapted_modules(model).values()))


def adapter_state(layer: Any) -> tuple[Any, ...]:
    """Return which adapters of a PEFT layer are active, whether they apply, and their scales."""
    return (
        tuple(getattr(layer, "active_adapters", ())),
        bool(getattr(layer, "disable_adapters", False)),
        bool(getattr(layer, "merged", False)),
        tuple(getattr(layer, "scaling", {}).items()),
    )


def _check_others(others: dict[str, Any], position_ids: Tensor | None) -> None:
    given = {name: value for name, value in others.items() if value is not None}
    unknown = sorted(given.keys() - _OF_PACKED - _WITHOUT_EFFECT)
    if unknown:
        refuse(f"{', '.join(unknown)} cannot be given")
    if given.keys() & _OF_PACKED and position_ids is None:
        refuse("packed rows without position_ids, which alone keep them apart in transformers' own "
               "attention")  # fmt: skip


def _divisor(rows: BatchRows, num_items_in_batch: Tensor | int | None) -> Tensor | int:
    divisor = rows.n_labels if num_items_in_batch is None else num_items_in_batch
    if not rows.n_labels and not divisor:
        raise UserError("tree_loss: the batch has no label (all are -100); leave such rows out")
    return divisor
