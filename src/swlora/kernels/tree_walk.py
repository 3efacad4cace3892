"""A decoder walked over prefix trees, whole or cut below its lowest adapted block.

The cut makes a frozen prefix and a trained suffix. All blocks that run must attend along the tree,
and its sequences must lie on one side of every limit of the model's rotary frequencies.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swlora.errors import RunFailedError
from swlora.kernels.attention_interface import attending
from swlora.kernels.block_walk import Walk
from swlora.kernels.device_clock import DeviceClock
from swlora.kernels.patched_forwards import patched_forwards
from swlora.kernels.recomputed import recomputed_block
from swlora.kernels.rotary import RotaryLengths
from swlora.kernels.tree_attention import tree_attention
from swlora.kernels.tree_layout import TreeLayout
from swlora.models.anatomy import Anatomy


class TreeWalk:
    """Walks a causal language model's decoder over prefix trees.

    `cut` is the lowest adapted block: blocks below it see no gradient.
    """

    def __init__(self, base_model: Any, cut: int) -> None:
        self.anatomy = Anatomy(base_model)
        self.base_model = base_model
        self.cut = cut
        self.rotary = RotaryLengths(base_model)
        self._walk = Walk(self.anatomy)
        self.n_below_nodes = 0  # of all calls of `prefix` so far
        self._below = DeviceClock()

    @torch.no_grad()
    def prefix(self, layout: TreeLayout) -> Tensor:
        """Return the hidden state at the input of block `cut`, (1, T, D), without a graph."""
        clock = self._below.running(layout.token_ids.device)
        with clock, self._following(layout, n_blocks=self.cut):
            hidden = self._walk.run(_inputs(layout), stop=self.cut)[0]
        self.n_below_nodes += layout.n_nodes
        return hidden

    @property
    def below_s(self) -> float:
        """The seconds of all calls of `prefix` so far, of which a GPU's last are waited for."""
        return self._below.seconds

    def whole(self, layout: TreeLayout) -> Tensor:
        """Return the final normed hidden state (1, T, D), nothing cut."""
        with self._following(layout, n_blocks=self.anatomy.n_layers):
            return self._walk.run(_inputs(layout))[0]

    @property
    def n_suffix(self) -> int:
        """The number of blocks from the cut on."""
        return self.anatomy.n_layers - self.cut

    def suffix(self, layout: TreeLayout, hidden: Tensor | None, *, n_recomputed: int = 0) -> Tensor:
        """Return the final normed hidden state (1, T, D) from the state at the cut.

        None for that state makes it on the way: every block is called once, as those should be
        whose weights are gathered when they are called. The lowest `n_recomputed` blocks from
        the cut on keep their input alone and run again in backward, when those above have let go
        of what they kept.
        """
        again = partial(self._following, layout, n_blocks=1)
        lowest = self.anatomy.blocks[self.cut : self.cut + n_recomputed]
        recomputed = {block: recomputed_block(block.forward, again) for block in lowest}
        start = 0 if hidden is None else self.cut
        following = self._following(layout, n_blocks=self.anatomy.n_layers - start)
        with following, patched_forwards(recomputed):
            walked = self._walk.run(_inputs(layout), start=start, entry=hidden, graph_from=self.cut)
            return walked[0]

    @contextmanager
    def _following(self, layout: TreeLayout, *, n_blocks: int) -> Iterator[None]:
        """Attend along the layout in the body, and make sure that `n_blocks` blocks did.

        A block with a configuration of its own would attend as if the tree were one sequence.
        """
        shortest, longest = layout.sequence_tokens
        if self.rotary.side(shortest) != self.rotary.side(longest):
            raise RunFailedError(
                f"a tree has sequences of {shortest} and of {longest} tokens, whose rotary "
                "frequencies differ, so the loss would be wrong"
            )
        attention = partial(tree_attention, layout)
        refusal = "attend along trees, so the loss would be wrong; this model needs --engine plain"
        attends = attending(self.base_model.config, attention, n_blocks, refusal)
        with attends, self.rotary.turning(longest):
            yield


def _inputs(layout: TreeLayout) -> dict[str, Any]:
    return {
        "input_ids": layout.token_ids,
        "position_ids": layout.position_ids,
        "use_cache": False,
    }
