"""Rotary frequencies that depend on how long a sequence is, for sequences that run together.

With LongRoPE (`rope_type` "longrope", as in Phi-3), transformers turns a whole batch by the long
factors as soon as its largest position lies beyond the pretraining length, so a short sequence
beside a long one is another sequence than alone. Here every sequence is turned as if it were
alone: callers say how long the sequence is to which a position belongs, and transformers is asked
once for each side of the limit. Of the other types, "dynamic" changes beyond
`max_position_embeddings` only, which is the context that no sequence here exceeds, and "default",
"linear", "llama3", "yarn" and "proportional" never change.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from swlora.kernels.patched_forwards import patched_forwards
from swlora.models.anatomy import context_tokens

# Models whose `generate` computes the cache anew when a text grows beyond a limit; others keep the
# keys that were turned by the short factors.
_RECOMPUTING_TYPES = ("phi3",)


class RotaryLengths:
    """The lengths at which a model's rotary frequencies change (`limits_tokens`, mostly none).

    Sequences on one side of every limit, up to it or beyond it, may run together.
    """

    def __init__(self, model: Any) -> None:
        context = context_tokens(model)
        rotary = {module: _limits(module) for module in model.modules()}
        self._modules = {module: limits for module, limits in rotary.items() if limits}
        limits = {limit for own in self._modules.values() for limit in own if limit < context}
        self.limits_tokens = tuple(sorted(limits))
        self.recomputes = bool(limits) and model.config.model_type in _RECOMPUTING_TYPES

    def side(self, n_tokens: int) -> int:
        """Return the side of a sequence of `n_tokens`: the number of limits that it exceeds."""
        return sum(n_tokens > limit for limit in self.limits_tokens)

    def sides(self, ids: NDArray[np.int64], lengths: NDArray[Any]) -> list[NDArray[np.int64]]:
        """Cut `ids` into arrays of sequences on one side; lengths (n,) are those of all."""
        if not self.limits_tokens:
            return [ids]
        side = np.searchsorted(self.limits_tokens, lengths[ids])
        return [ids[side == one] for one in np.unique(side)]

    @contextmanager
    def turning(self, lengths: Tensor | int) -> Iterator[None]:
        """Turn every position as in a sequence of its length while the body runs.

        lengths: (B, T) or (B, 1), in tokens, or one for all.
        """
        if not self.limits_tokens:
            yield
            return
        with patched_forwards(self._forwards(lengths)):
            yield

    def _forwards(self, lengths: Tensor | int) -> Mapping[nn.Module, Callable[..., Any]]:
        if isinstance(lengths, int):
            lengths = torch.tensor([[lengths]])
        bounds = torch.tensor(self.limits_tokens, device=lengths.device)
        side = torch.searchsorted(bounds, lengths)
        longest = {int(one): int(lengths[side == one].max()) for one in side.unique()}
        return {m: _by_side(m.forward, side, longest) for m in self._modules}


def _by_side(
    forward: Callable[..., Any], side: Tensor, longest: Mapping[int, int]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a rotary forward that takes each position's cosine and sine from its own side.

    transformers decides by the largest position, so the end of the side's longest sequence is put
    behind the others and taken away again.
    """

    def turned(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        cos = sin = None
        for one, n_tokens in longest.items():
            end = position_ids.new_full((position_ids.shape[0], 1), n_tokens - 1)
            positions = torch.cat([position_ids.clamp(max=n_tokens - 1), end], dim=1)
            new_cos, new_sin = (t[:, :-1] for t in forward(x, positions, *args, **kwargs))
            if cos is None or sin is None:
                cos, sin = new_cos, new_sin
            else:
                here = (side == one).to(cos.device)[..., None]
                cos, sin = torch.where(here, new_cos, cos), torch.where(here, new_sin, sin)
        assert cos is not None and sin is not None
        return cos, sin

    return turned


def _limits(module: nn.Module) -> list[int]:
    """Return the lengths at which this module, if it is a rotary embedding, changes."""
    types: Any = getattr(module, "rope_type", None)
    config: Any = getattr(module, "config", None)
    settings: Any = getattr(config, "rope_parameters", None)
    if types is None or not isinstance(settings, dict):
        return []
    if isinstance(types, dict):  # one type for each kind of layer
        pairs = [(rope_type, settings[layer]) for layer, rope_type in types.items()]
    else:
        pairs = [(types, settings)]
    return [int(s["original_max_position_embeddings"]) for t, s in pairs if t == "longrope"]
