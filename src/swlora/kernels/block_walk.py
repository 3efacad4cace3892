"""A decoder walked over windows of text from any block on, and the loss of what comes out.

Zeroing a weight of block l changes nothing below it, so the walk may begin at the hidden state
that enters block l. The model's own forward prepares masks and rotary tables and calls its blocks
in turn; those below l hand through what they get, and the state is put in at l. Works for any
decoder whose blocks take the hidden state first and return it, alone or in a tuple.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from swlora.kernels.linear.backends import WITHOUT_COPIES, backend_of, forwards_without_copies
from swlora.kernels.patched_forwards import patched_forwards
from swlora.models.anatomy import Anatomy
from swlora.threads import adapt_threads

HEAD_ROWS = 256  # rows of logits alive at a time
SOFTMAX_ROWS = 16  # of these, rows that stay in a CPU's cache while they are read twice


class Walk:
    """Walks one model; use its methods inside `ready()`."""

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        self._head: Any = anatomy.head
        self._head_products = backend_of(anatomy.head, WITHOUT_COPIES)
        self._cap = float(getattr(anatomy.model.config, "final_logit_softcapping", None) or 0.0)
        self._blocks_return_tuples = False  # known after the first whole walk
        self._start = 0
        self._entry: Tensor | None = None
        self._keep: Collection[int] = ()
        self._kept: dict[int, Tensor] = {}

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Put the walk's own forwards into the model while the body runs."""
        blocks = self._anatomy.blocks
        forwards = {b: self._block_forward(i, b.forward) for i, b in enumerate(blocks)}
        with (
            torch.inference_mode(),
            patched_forwards(forwards),
            patched_forwards(forwards_without_copies(self._anatomy.backbone)),
        ):
            yield

    def hidden(
        self, token_ids: Tensor, start: int, entry: Tensor | None, keep: Collection[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the final normed hidden state (B, T, D) of token ids (B, T), and others.

        `entry` (B, T, D) is the state at the input of block `start`; None walks from the tokens.
        The others are the states at the input of the blocks in `keep`, none below `start`.
        """
        self._start, self._entry, self._keep = start, entry, keep
        kept: dict[int, Tensor] = {}
        self._kept = kept
        try:
            out = self._anatomy.backbone(input_ids=token_ids, use_cache=False)
        finally:
            self._entry, self._kept = None, {}
        return out[0], kept

    def token_nats(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """Return the loss of every predicted token, (B, T - 1), in nats, float32 at least."""
        rows = hidden[:, :-1].flatten(0, 1)
        targets = token_ids[:, 1:].flatten()
        chunks = zip(rows.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True)
        nats = [_cross_entropy(self._logits(chunk), target) for chunk, target in chunks]
        return torch.cat(nats).view(len(hidden), -1)

    def _logits(self, rows: Tensor) -> Tensor:
        z = self._head_products.product(rows, self._head.bias)
        if z.dtype != torch.float64:
            z = z.float()
        return z if not self._cap else z.div_(self._cap).tanh_().mul_(self._cap)

    def _block_forward(self, layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            adapt_threads()
            if layer < self._start:
                return (hidden,) if self._blocks_return_tuples else hidden
            if layer == self._start and self._entry is not None:
                hidden = self._entry
            if layer in self._keep:
                self._kept[layer] = hidden.clone()
            output = forward(hidden, *args, **kwargs)
            self._blocks_return_tuples = isinstance(output, tuple)
            return output

        return run


def _cross_entropy(z: Tensor, targets: Tensor) -> Tensor:
    """Return logsumexp(z) - z[target] for every row of logits (C, V), which are overwritten.

    With m the largest logit, logsumexp(z) = m - log(max softmax(z)): no third array of that size.
    """
    if z.device.type != "cpu":
        return F.cross_entropy(z, targets, reduction="none")
    nats = []
    for rows, target in zip(z.split(SOFTMAX_ROWS), targets.split(SOFTMAX_ROWS), strict=True):
        largest = rows.amax(-1)
        gap = largest - rows.gather(1, target[:, None])[:, 0]
        torch.softmax(rows, -1, out=rows)
        nats.append(gap - rows.amax(-1).log())
    return torch.cat(nats)
