"""The loss of every token of windows of text, for inference: a few rows of logits at a time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from swlora.kernels.linear.backends import WITHOUT_COPIES, backend_of
from swlora.kernels.wide import wide
from swlora.models.anatomy import Anatomy
from swlora.models.linear_maps import is_linear_map

HEAD_ROWS = 256  # rows of logits alive at a time
SOFTMAX_ROWS = 16  # of these, rows that stay in a CPU's cache while they are read twice


def token_nats(anatomy: Anatomy, hidden: Tensor, token_ids: Tensor) -> Tensor:
    """Return the loss of every predicted token, (B, T - 1), in nats, float32 at least.

    hidden (B, T, D) is the final normed state of token ids (B, T). Without a gradient.
    """
    head: Any = anatomy.head
    rows = hidden[:, :-1].flatten(0, 1)
    targets = token_ids[:, 1:].flatten()
    product, nats = _product(head), list[Tensor]()
    for chunk, target in zip(rows.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        z = wide(product(chunk))
        if cap := anatomy.logit_cap:
            z.div_(cap).tanh_().mul_(cap)
        nats.append(_cross_entropy(z, target))
    return torch.cat(nats).view(len(hidden), -1)


def _product(head: Any) -> Callable[[Tensor], Tensor]:
    if not is_linear_map(head):
        return head  # type: ignore[no-any-return]
    products = backend_of(head, WITHOUT_COPIES)
    return lambda rows: products.product(rows, head.bias)


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
