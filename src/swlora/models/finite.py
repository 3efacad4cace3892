"""Whether numbers are numbers: a model with a NaN in it makes every loss one, whatever the rate."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from swlora.errors import UserError
from swlora.models.quantised_weight import QuantisedWeight
from swlora.models.sharded_weight import own_part

PART_NUMBERS = 1 << 22


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Return how many numbers of each named tensor are NaN or infinite, where some are.

    Sums show it, of a part at a time, which is copied to float32; only where one is not finite is
    every number asked. Of a weight that is divided over processes each looks at its part.
    """
    found = dict[str, int]()
    for name, given in tensors:
        tensor = own_part(given)
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        if isinstance(tensor, QuantisedWeight):
            if n := tensor.matrix.n_not_finite():
                found[name] = n
        elif not all(torch.isfinite(part.sum(dtype=torch.float32)) for part in _parts(tensor)):
            n = int((~torch.isfinite(tensor.detach())).sum())
            if n:
                found[name] = n
    return found


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """Return a tensor as views of about PART_NUMBERS numbers, or of one row each."""
    plain = tensor.detach()
    if plain.dim() == 0:
        return [plain]
    parts: Sequence[Tensor] = plain.split(
        max(1, PART_NUMBERS * len(plain) // max(1, plain.numel()))
    )
    return parts


def check_finite(model: torch.nn.Module, source: str) -> None:
    """Raise UserError, which names the first of them, where a model holds what is no number."""
    found = not_finite([*model.named_parameters(), *model.named_buffers()])
    if not found:
        return
    name, n = next(iter(found.items()))
    more = f", and {len(found) - 1} more tensors" if len(found) > 1 else ""
    raise UserError(
        f"{source} holds numbers that are not finite: {n:,} in {name}{more}; "
        "get the model again, or try --dtype float32 if they come from its dtype"
    )
