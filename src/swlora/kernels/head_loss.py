"""The loss over a frozen head, chunk by chunk, with the hidden states' gradient made on the way.

Row i of the hidden states is scored against several targets c with weights w_c, W_i = sum w_c:

    L_i = W_i lse(z_i) - (1 - e) sum_c w_c z_i[c] - e W_i mean(z_i),   z_i = head(h_i)
    dL_i/dz_i = W_i softmax(z_i) - (1 - e) sum_c w_c onehot(c) - e W_i / V

with e the label smoothing. Only a chunk of logits lives at a time, nothing of it is kept, and a
frozen head needs no weight gradient, so the head costs two matrix products a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from swlora.kernels.first_order import first_order
from swlora.kernels.linear.frozen import FrozenLinear
from swlora.kernels.wide import wide, wide_dtype
from swlora.models.linear_maps import is_linear_map

CHUNK_ROWS = 128
WIDE_ROWS = 16  # rows in float32 at a time: they stay in the cache
# Elsewhere a few large kernels are what fills the device; three arrays of so many logits live.
DEVICE_ROWS, DEVICE_LOGITS = 4096, 1 << 28  # at most: 1 GB in float32


@dataclass(frozen=True)
class Targets:
    """What the rows are scored against: target k is id `ids[k]` at row `rows[k]`, sorted by row.

    rows, ids (K,) int64; weights (K,) float32; row_weights (N,) float32 are their sums by row.
    """

    rows: Tensor
    ids: Tensor
    weights: Tensor
    row_weights: Tensor
    host_rows: NDArray[np.int64] | None = None  # `rows`, where to ask the device would be to wait

    def rows_on_host(self) -> NDArray[np.int64]:
        """Return `rows` as an array."""
        return self.rows.cpu().numpy() if self.host_rows is None else self.host_rows


def head_loss(
    hidden: Tensor,
    head: nn.Linear,
    targets: Targets,
    *,
    smoothing: float = 0.0,
    cap: float = 0.0,
    frozen: FrozenLinear | None = None,
) -> Tensor:
    """Return the summed loss in nats, a float32 scalar, of hidden states (N, D).

    `cap` > 0 is the soft cap that some families put on logits: cap * tanh(z / cap).
    A head that is trained itself, wrapped by an adapter or of another kind goes through an
    ordinary differentiable pass. Copies of its weight are those of `frozen`, or of the fast forward
    in its place; without one, they last for this call.
    """
    if head.weight.requires_grad or not is_linear_map(head):
        return _differentiable(hidden, head, targets, smoothing, cap)
    if frozen is None:
        frozen = head.forward if isinstance(head.forward, FrozenLinear) else FrozenLinear(head)
    with frozen.held():
        return _frozen_head_loss(hidden, frozen, targets, smoothing, cap)


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: FrozenLinear,
        targets: Targets,
        smoothing: float,
        cap: float,
    ) -> Tensor:
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        chunk_rows, wide_rows = _rows_at_once(hidden, head.n_out)
        work = _wide_rows(hidden, wide_rows, head.n_out)
        edges = np.arange(0, len(hidden) + chunk_rows, chunk_rows)
        bounds = np.searchsorted(targets.rows_on_host(), edges).tolist()
        for chunk, start in enumerate(range(0, len(hidden), chunk_rows)):
            rows = slice(start, min(start + chunk_rows, len(hidden)))
            of_chunk = slice(bounds[chunk], bounds[chunk + 1])
            chunk_targets = Targets(
                targets.rows[of_chunk] - start,
                targets.ids[of_chunk],
                targets.weights[of_chunk],
                targets.row_weights[rows],
            )
            z = head.product(hidden[rows], head.bias)
            loss += _loss_and_gradient(z, chunk_targets, work, smoothing, cap)
            if d_hidden is not None:
                weights = targets.row_weights[rows, None].to(hidden.dtype)
                torch.mul(head.input_gradient(z), weights, out=d_hidden[rows])
        if d_hidden is not None:
            ctx.save_for_backward(d_hidden)
        return loss.to(wide_dtype(hidden.dtype))

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d_hidden,) = ctx.saved_tensors
        return d_hidden * grads[0].to(d_hidden.dtype), None, None, None, None


_frozen_head_loss: Callable[..., Tensor] = _FrozenHeadLoss.apply


def _rows_at_once(hidden: Tensor, n_tokens: int) -> tuple[int, int]:
    """Return the rows of logits that are alive together, and those of them in float32."""
    if hidden.device.type == "cpu":
        return CHUNK_ROWS, WIDE_ROWS
    n_rows = max(CHUNK_ROWS, min(DEVICE_ROWS, DEVICE_LOGITS // n_tokens))
    return n_rows, n_rows


def _wide_rows(hidden: Tensor, n_rows: int, n_tokens: int) -> Tensor:
    """Return memory for a few rows of logits in float32, used again for all: it stays warm."""
    shape = min(n_rows, len(hidden)), n_tokens
    return hidden.new_empty(shape, dtype=wide_dtype(hidden.dtype))


def _loss_and_gradient(
    z: Tensor, targets: Targets, work: Tensor, smoothing: float, cap: float
) -> Tensor:
    """Return the loss of a chunk of logits (C, V), which become dL/dz / W_i in place."""
    loss = torch.zeros((), dtype=torch.float64, device=z.device)
    if cap:
        z.div_(cap).tanh_().mul_(cap)
    z_target = wide(z[targets.rows, targets.ids])
    log_normaliser = torch.empty(len(z), dtype=z_target.dtype, device=z.device)
    for start in range(0, len(z), len(work)):
        rows = slice(start, start + len(work))
        p = work[: len(z[rows])].copy_(z[rows])
        if smoothing:
            loss -= smoothing * (targets.row_weights[rows] * p.mean(-1)).sum()
        slope = 1 - (p / cap) ** 2 if cap else None
        largest = p.amax(-1)
        p = torch.softmax(p, -1, out=p if p.device.type == "cpu" else None)
        log_normaliser[rows] = largest - p.amax(-1).log()  # the largest never underflows
        if smoothing:
            p -= smoothing / z.shape[1]
        z[rows] = p if slope is None else p.mul_(slope)
    loss += (targets.row_weights * log_normaliser).sum(dtype=torch.float64)
    loss -= (1 - smoothing) * (targets.weights * z_target).sum(dtype=torch.float64)
    _subtract_targets(z, targets, log_normaliser, z_target, smoothing, cap)
    return loss


def _subtract_targets(
    z: Tensor,
    targets: Targets,
    log_normaliser: Tensor,
    z_target: Tensor,
    smoothing: float,
    cap: float,
) -> None:
    """Put (p - e / V - (1 - e) w / W) at the targets, rounded to the logits' dtype once."""
    p = (z_target - log_normaliser[targets.rows]).exp()
    share = targets.weights.to(p.dtype) / targets.row_weights[targets.rows]
    gradient = p - (1 - smoothing) * share
    if smoothing:
        gradient -= smoothing / z.shape[1]
    if cap:
        gradient *= 1 - (z_target / cap) ** 2
    z[targets.rows, targets.ids] = gradient.to(z.dtype)


def _differentiable(
    hidden: Tensor, head: nn.Linear, targets: Targets, smoothing: float, cap: float
) -> Tensor:
    z = wide(head(hidden))
    if cap:
        z = cap * torch.tanh(z / cap)
    log_p = torch.log_softmax(z, dim=-1)
    loss = -(1 - smoothing) * (targets.weights * log_p[targets.rows, targets.ids]).sum()
    if smoothing:
        loss = loss - smoothing * (targets.row_weights * log_p.mean(-1)).sum()
    return loss
