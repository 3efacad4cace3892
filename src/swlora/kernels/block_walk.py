"""A decoder walked from one block to another, through the model's own forward.

That forward prepares masks and rotary tables and calls the blocks in turn. Blocks outside the walk
hand through what they get; the hidden state is put in where the walk starts, and taken out at the
input of the block where it stops. No forward is left by an exception, so every hook fires: sharding
(FSDP2) gathers weights in one hook and frees them in another. Works for any decoder whose blocks
take the hidden state first and return it, alone or first in a tuple.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from swlora.kernels.patched_forwards import patched_forwards
from swlora.models.anatomy import Anatomy
from swlora.threads import adapt_threads


class Walk:
    """Walks through the blocks of one model."""

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy

    def run(
        self,
        inputs: Mapping[str, Any],
        *,
        start: int = 0,
        entry: Tensor | None = None,
        stop: int | None = None,
        keep: Collection[int] = (),
        graph_from: int = 0,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the blocks from `start` on and below `stop`; return the state there, and others.

        `inputs` are the decoder's arguments. `entry` is the hidden state (B, T, D) at the input of
        block `start`; None walks from the tokens. Returned are the state at the input of block
        `stop`, or the final normed one where that is None, and copies of the states at the inputs
        of the blocks in `keep`. Blocks below `graph_from` leave no graph. Raises ValueError for
        blocks that the walk does not pass.
        """
        self._check(start, entry, stop, keep)
        end = self._anatomy.n_layers if stop is None else stop
        at_stop: list[Tensor] = []
        kept: dict[int, Tensor] = {}

        def walked(layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
                if layer == start and entry is not None:
                    hidden = entry
                if layer in keep:
                    kept[layer] = hidden.clone()
                if layer == stop:
                    at_stop.append(hidden)
                if not start <= layer < end:
                    return (hidden,) if self._anatomy.family.blocks_return_tuples else hidden
                adapt_threads()
                with torch.set_grad_enabled(torch.is_grad_enabled() and layer >= graph_from):
                    return forward(hidden, *args, **kwargs)

            return run

        forwards: dict[nn.Module, Callable[..., Any]] = {
            block: walked(layer, block.forward) for layer, block in enumerate(self._anatomy.blocks)
        }
        if stop is not None and self._anatomy.final_norm is not None:
            forwards[self._anatomy.final_norm] = lambda hidden: hidden  # nobody reads it
        with patched_forwards(forwards):
            output = self._anatomy.backbone(**inputs)
        return (output[0] if stop is None else at_stop[0]), kept

    def _check(
        self, start: int, entry: Tensor | None, stop: int | None, keep: Collection[int]
    ) -> None:
        last = self._anatomy.n_layers - 1
        if not 0 <= start <= (last if stop is None else stop) <= last:
            raise ValueError(f"blocks {start} to {stop} are no walk through blocks 0 to {last}")
        if start and entry is None:
            raise ValueError(f"a walk from block {start} needs the hidden state there")
        if not all(start <= layer <= (last if stop is None else stop) for layer in keep):
            raise ValueError(f"a walk from block {start} to {stop} does not pass all of {keep}")
