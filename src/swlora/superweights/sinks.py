"""Attention sinks: how much of its attention every layer spends on the first position of a text.

With A[h, i, k] the attention of head h from query i to key k (the softmax, so that its rows sum to
1), and T positions, a head's sink score is that of the first key in arXiv 2410.10781, section 3.2:

    score(h) = 1/T * sum over all queries i of A[h, i, 0]

The first query sees the first key alone, so no score is below 1/T. The mass of a layer is the mean
score of its heads; a head is a sink head where its score exceeds 0.3, that paper's threshold. Both
are means over the windows of a text. Scores shrink where T grows, so compare equal windows only.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swlora.errors import RunFailedError
from swlora.kernels.linear.backends import forwards_without_copies
from swlora.kernels.patched_forwards import patched_forwards
from swlora.models.anatomy import Anatomy
from swlora.processes import dealt
from swlora.threads import adapt_threads

SINK_SCORE = 0.3


@dataclass(frozen=True)
class Sinks:
    """Of every layer the mass on the first position, and the share of its heads that are sinks."""

    mass: list[float]
    sink_heads: list[float]


def measure_sinks(anatomy: Anatomy, windows: Tensor) -> Sinks:
    """Return the sinks of every layer over windows (n, T) of token ids, one window at a time.

    The model attends by transformers' eager function, the only one that shows its weights.
    Several processes share the windows. Raises RunFailedError where a layer shows no weights.
    """
    found = dealt(windows.split(1), lambda window: _sinks_of(anatomy, window))
    mass, sink_heads = torch.tensor(found, dtype=torch.float64).mean(dim=0).tolist()
    return Sinks(mass, sink_heads)


@torch.inference_mode()
def _sinks_of(anatomy: Anatomy, window: Tensor) -> list[list[float]]:
    """Return the masses of all layers, and their shares of sink heads, of one window (1, T)."""
    masses, shares = [0.0] * anatomy.n_layers, [0.0] * anatomy.n_layers

    def note(layer: int, weights: Tensor) -> None:
        scores = weights[..., 0].float().mean(dim=-1).cpu()  # (1, H)
        masses[layer] = float(scores.mean())
        shares[layer] = float((scores > SINK_SCORE).double().mean())

    adapt_threads()
    fast = patched_forwards(forwards_without_copies(anatomy.backbone))
    with _attention_seen(anatomy, note), fast:
        anatomy.backbone(input_ids=window.to(anatomy.model.device), use_cache=False)
    return [masses, shares]


@contextmanager
def _attention_seen(anatomy: Anatomy, note: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `note` with a layer and its attention weights (B, H, T, K) while the body runs.

    Afterwards the model attends as before, also when the body raises.
    """
    config, name = anatomy.model.config, anatomy.family.attention_out.rpartition(".")[0]
    previous = config._attn_implementation
    with ExitStack() as stack:
        stack.callback(setattr, config, "_attn_implementation", previous)
        config._attn_implementation = "eager"
        for layer, block in enumerate(anatomy.blocks):

            def hook(_m: nn.Module, _x: Any, output: Any, layer: int = layer) -> None:
                if not isinstance(output, tuple) or not isinstance(output[1], Tensor):
                    raise RunFailedError(f"layer {layer} shows no attention weights")
                note(layer, output[1])

            handle = block.get_submodule(name).register_forward_hook(hook)
            stack.callback(handle.remove)
        yield
