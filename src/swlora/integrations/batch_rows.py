"""The rows of somebody else's batch as token sequences: padded on either side, or packed.

A row is a stretch of tokens that the mask keeps; without a mask it is cut wherever its positions do
not go on by one, as transformers cuts packed rows (`masking_utils.find_packed_sequence_indices`).
What is behind its last label changes nothing and is left away.
"""

from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swlora.data.token_sequences import TokenSequences
from swlora.errors import UserError

IGNORED = -100
# OPT counts positions from the first token that the mask keeps, and its masks know no packed rows:
# they see each other whatever is given (transformers 5.23, `findings/opt_packed_rows_leak.sh`).
_POSITIONS_FROM_MASK = _NEVER_PACKED = ("opt",)


def refuse(why: str) -> NoReturn:
    """Raise the UserError of a loss that would not be that of the model's own forward."""
    raise UserError(f"tree_loss: {why}; the plain way is model(...).loss")


@dataclass(frozen=True)
class BatchRows:
    """The rows of a batch that have a label.

    `sequences` is None where none has. `first_positions` (n,) int64 are the positions of their
    first tokens, `n_positions` one more than the largest position of the batch, `n_labels` what a
    mean loss is divided by.
    """

    sequences: TokenSequences | None
    first_positions: NDArray[np.int64]
    n_positions: int
    n_labels: int


def read_rows(
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    model_type: str = "",
) -> BatchRows:
    """Read the rows of token ids and labels (B, T), mask (B, T) or None, positions (B or 1, T).

    Without positions a token has that of its column. Raises UserError for what prefix trees cannot
    reproduce of a model of this type.
    """
    _check_shapes(input_ids, labels, attention_mask, position_ids)
    ids, wanted = _array(input_ids), _array(labels)
    mask = None if attention_mask is None else _array(attention_mask)
    kept = np.ones(ids.shape, bool) if mask is None else mask == 1
    columns = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    positions = (
        columns if position_ids is None else np.broadcast_to(_array(position_ids), ids.shape)
    )
    follows = np.zeros(ids.shape, bool)  # belongs to the sequence of the token before
    follows[:, 1:] = kept[:, 1:] & kept[:, :-1]
    if mask is not None:
        _check_mask(mask, kept, follows)
    goes_on = np.diff(positions, axis=1) == 1
    if mask is None:
        if model_type in _NEVER_PACKED and not goes_on.all():
            refuse(f"packed rows, which see each other in transformers' {model_type}; pad them")
        follows[:, 1:] &= goes_on
    elif (follows[:, 1:] & ~goes_on).any():
        refuse("position_ids that begin again beside an attention_mask, where transformers lets "
               "packed rows see each other; leave the mask out")  # fmt: skip
    scored = wanted != IGNORED
    scored[:, 0] = False  # as in transformers: nothing predicts it
    _check_labels(ids, wanted, scored, kept, follows)
    if mask is not None and position_ids is None and model_type in _POSITIONS_FROM_MASK:
        positions = np.cumsum(kept, axis=1) - 1
    sequences, first = _sequences(ids, scored, kept, kept & ~follows)
    return BatchRows(
        sequences, positions[kept][first], int(positions.max()) + 1, int(np.count_nonzero(scored))
    )


def _sequences(
    ids: NDArray[np.int64], scored: NDArray[np.bool_], kept: NDArray[np.bool_],
    starts: NDArray[np.bool_],
) -> tuple[TokenSequences | None, NDArray[np.int64]]:  # fmt: skip
    """Return the sequences that are scored, up to their last label, and where each begins among the
    kept tokens.
    """
    first = np.flatnonzero(starts[kept])
    is_scored = scored[kept]
    places = np.flatnonzero(is_scored)
    if not len(places):
        return None, first[:0]
    end = np.zeros(len(first), np.int64)  # behind the last label of each
    np.maximum.at(end, np.searchsorted(first, places, side="right") - 1, places + 1)
    first, end = first[end > 0], end[end > 0]
    lengths = end - first
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    token = np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], lengths)
    tokens = ids[kept][token].astype(np.int32)
    return TokenSequences(tokens, offsets, is_scored[token]), first


def _array(tensor: Tensor) -> NDArray[np.int64]:
    return tensor.detach().to("cpu", torch.int64).numpy()


def _check_shapes(
    input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> None:
    given = {"input_ids": input_ids, "labels": labels}
    given |= {"attention_mask": attention_mask} if attention_mask is not None else {}
    given |= {"position_ids": position_ids} if position_ids is not None else {}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor) or tensor.is_floating_point():
            raise UserError(f"tree_loss: {name} must be a tensor of integers")
        shapes = [input_ids.shape]
        if name == "position_ids":
            shapes.append(torch.Size([1, *input_ids.shape[1:]]))
        if tensor.ndim != 2 or tensor.shape not in shapes or tensor.numel() == 0:
            shape = tuple(tensor.shape)
            refuse(f"{name} of shape {shape}, where all must be (rows, tokens) of one size")


def _check_mask(
    mask: NDArray[np.int64], kept: NDArray[np.bool_], follows: NDArray[np.bool_]
) -> None:
    if not np.isin(mask, (0, 1)).all():
        refuse("an attention_mask with other values than 0 and 1")
    if ((kept & ~follows).sum(axis=1) > 1).any():
        refuse("an attention_mask that is no padding: it leaves out tokens in the middle of a row")


def _check_labels(
    ids: NDArray[np.int64], wanted: NDArray[np.int64], scored: NDArray[np.bool_],
    kept: NDArray[np.bool_], follows: NDArray[np.bool_],
) -> None:  # fmt: skip
    if (scored & ~kept).any():
        refuse(f"a label on padding; set it to {IGNORED}")
    if (scored & ~follows).any():
        refuse("a label on the first token of a row, which transformers scores against what lies "
               f"before the row; set it to {IGNORED}")  # fmt: skip
    if (wanted != ids)[scored].any():
        refuse("labels that are other tokens than input_ids")
