"""The loss of a model over text while single scalars of it are zero, or scaled.

A scalar of block l changes nothing below block l. So the hidden state that enters a block where
ablations begin is kept, named by the changes made below it, and every measurement begins at the
deepest state that is its own: a weight of the last block costs one block and the head. All but one
of a joint ablation begin at the joint pass's state, at the block of the one that is left out.

Losses travel as sums and counts over blocks of 64 tokens, so that intervals can be drawn.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from swlora.errors import RunFailedError, UserError
from swlora.kernels.block_walk import Walk
from swlora.kernels.linear.backends import forwards_without_copies
from swlora.kernels.patched_forwards import patched_forwards
from swlora.kernels.token_nats import token_nats
from swlora.loss_sum import LossSum
from swlora.models.anatomy import Anatomy, WeightAddress, context_tokens
from swlora.plural import are, counted
from swlora.superweights.ablate import scaled

BLOCK_TOKENS = 64
MAX_NATS = 700.0  # no token is charged more, so that every perplexity and ratio is a finite float
CACHE_BYTES = 1 << 30
BATCH_TOKENS = 2048

Changes = frozenset[tuple[WeightAddress, float]]
_NO_CHANGES: Changes = frozenset()


@dataclass(frozen=True)
class BlockLosses:
    """Summed loss in nats and predicted tokens of every 64-token block, window after window.

    The first token of a window is not predicted; the last block of a window may be shorter.
    """

    sums_nats: tuple[float, ...]
    n_tokens: tuple[int, ...]

    @property
    def total(self) -> LossSum:
        """The loss over all blocks."""
        return LossSum(sum(self.sums_nats), sum(self.n_tokens))

    def first(self, n_blocks: int) -> "BlockLosses":
        """Return the losses of the first blocks alone."""
        return BlockLosses(self.sums_nats[:n_blocks], self.n_tokens[:n_blocks])


def rise_nats(base: BlockLosses, ablated: BlockLosses) -> float:
    """Return by how much the mean loss of a token rose."""
    return ablated.total.nats_per_token - base.total.nats_per_token


class Meter:
    """Measures the loss of one model over windows (n, T) of token ids.

    It remembers losses and hidden states (up to `cache_bytes` of these), so the model must not
    change during its life. Raises UserError where the windows do not suit the model.
    """

    def __init__(self, model: Any, windows: Tensor, *, cache_bytes: int = CACHE_BYTES) -> None:
        if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
            raise UserError("perplexity needs at least one window of two tokens or more")
        if windows.shape[1] > context_tokens(model):
            raise UserError(
                f"windows of {windows.shape[1]} tokens exceed the model's context of "
                f"{context_tokens(model)}"
            )
        self.anatomy = Anatomy(model)
        self.windows = windows.to(model.device)
        self._walk = Walk(self.anatomy)
        self._measured: dict[tuple[Changes, int], BlockLosses] = {}
        self._states: OrderedDict[tuple[int, Changes], Tensor] = OrderedDict()
        state_bytes = windows.numel() * int(model.config.hidden_size) * model.dtype.itemsize
        self._max_states = cache_bytes // state_bytes

    @property
    def n_windows(self) -> int:
        """Number of windows."""
        return len(self.windows)

    def measure(
        self,
        scales: Mapping[WeightAddress, float],
        *,
        n_windows: int | None = None,
        keep: Collection[int] = (),
    ) -> BlockLosses:
        """Return the losses with every addressed scalar times its factor (0 ablates it).

        With nothing to change it is the model as it is. `n_windows` measures the first ones only;
        `keep` names blocks at which later measurements will begin, beside the lowest one changed.
        The model is whole afterwards, bit for bit, whatever happens. Raises UserError for what
        does not exist and for factors that are not finite, RunFailedError where the unchanged
        model's loss is not finite.
        """
        n = self.n_windows if n_windows is None else n_windows
        if not 1 <= n <= self.n_windows:
            raise UserError(
                f"there {are(self.n_windows)} {counted(self.n_windows, 'window')} of text, not {n}"
            )
        if not all(isfinite(factor) for factor in scales.values()):
            raise UserError("a weight can be scaled by a finite factor only")
        if not set(keep) <= set(range(self.anatomy.n_layers)):
            raise UserError(f"not all of layers {sorted(keep)} exist in this model")
        changes = changes_of(scales)
        if (changes, self.n_windows) in self._measured:
            blocks_a_window = -(-(self.windows.shape[1] - 1) // BLOCK_TOKENS)
            return self._measured[changes, self.n_windows].first(n * blocks_a_window)
        if (changes, n) not in self._measured:
            with scaled(self.anatomy, dict(changes)):
                nats = self._run(changes, n, keep)
            if not changes and not bool(nats.isfinite().all()):
                raise RunFailedError(
                    "the model's loss on the text is not finite; --dtype float32 may help"
                )
            self._measured[changes, n] = _by_block(nats)
        return self._measured[changes, n]

    def ablate(
        self, addresses: Iterable[WeightAddress], *, n_windows: int | None = None
    ) -> BlockLosses:
        """Return the losses with every addressed scalar zero."""
        return self.measure(dict.fromkeys(addresses, 0.0), n_windows=n_windows)

    def measure_within(
        self, change: AbstractContextManager[None], *, lowest_layer: int = 0
    ) -> BlockLosses:
        """Return the losses over all windows while `change` is made to the model, by one process.

        `change` touches nothing below block `lowest_layer`, sees every window once, in their order,
        and gives the model back as it was. Nothing is remembered.
        """
        with change:
            return _by_block(self._run(_NO_CHANGES, self.n_windows, (), lowest_layer))

    def _run(
        self, changes: Changes, n: int, keep: Collection[int], lowest_layer: int | None = None
    ) -> Tensor:
        """Run the model, already changed; return its losses (n, T - 1), not bounded yet.

        `lowest_layer` is the block from which on it is changed in ways beside `changes`.
        """
        start, entry = self._deepest_state(changes, lowest_layer)
        wanted: list[int] = []
        # A state of some windows, or of other changes, could not be used again.
        if n == self.n_windows and lowest_layer is None:
            lowest = min((address.layer for address, _ in changes), default=0)
            wanted = sorted(layer for layer in {lowest, *keep} if layer > start)
            wanted = wanted[max(0, len(wanted) - self._max_states) :]
        nats: list[Tensor] = []
        kept: dict[int, list[Tensor]] = {layer: [] for layer in wanted}
        n_at_once = max(1, BATCH_TOKENS // self.windows.shape[1])
        fast = patched_forwards(forwards_without_copies(self.anatomy.backbone))
        with torch.inference_mode(), fast:
            for first in range(0, n, n_at_once):
                batch = slice(first, min(first + n_at_once, n))
                windows, part = self.windows[batch], None if entry is None else entry[batch]
                inputs = {"input_ids": windows, "use_cache": False}
                hidden, states = self._walk.run(inputs, start=start, entry=part, keep=wanted)
                nats.append(token_nats(self.anatomy, hidden, windows))
                for layer in wanted:
                    kept[layer].append(states[layer])
        for layer in wanted:
            self._keep_state(layer, changes, torch.cat(kept[layer]))
        return torch.cat(nats)

    def _deepest_state(
        self, changes: Changes, highest: int | None = None
    ) -> tuple[int, Tensor | None]:
        highest = self.anatomy.n_layers - 1 if highest is None else highest
        for layer in range(highest, 0, -1):
            key = (layer, _below(changes, layer))
            if key in self._states:
                self._states.move_to_end(key)
                return layer, self._states[key]
        return 0, None

    def _keep_state(self, layer: int, changes: Changes, state: Tensor) -> None:
        while len(self._states) >= self._max_states:
            self._states.popitem(last=False)
        self._states[layer, _below(changes, layer)] = state


def changes_of(scales: Mapping[WeightAddress, float]) -> Changes:
    """Return what differs from the model as it is."""
    return frozenset((a, float(f)) for a, f in scales.items() if f != 1)


def _below(changes: Changes, layer: int) -> Changes:
    return frozenset(change for change in changes if change[0].layer < layer)


def _by_block(nats: Tensor) -> BlockLosses:
    bounded = nats.double().nan_to_num(MAX_NATS, MAX_NATS).clamp(max=MAX_NATS)
    blocks = [block for window in bounded for block in window.split(BLOCK_TOKENS)]
    sums = torch.stack([block.sum() for block in blocks]).tolist()
    return BlockLosses(tuple(sums), tuple(len(block) for block in blocks))
