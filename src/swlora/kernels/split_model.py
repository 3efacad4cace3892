"""A decoder cut below its lowest adapted block: a frozen prefix and a trained suffix.

The model's own forward prepares masks and rotary tables and walks through its blocks. For the
prefix, the walk is ended at the cut and the hidden state there is taken out; for the suffix, the
blocks below the cut hand through what they get and the hidden state is put in at the cut. Works
for any decoder whose blocks take the hidden state first and return it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from swlora.errors import RunFailedError
from swlora.kernels.patched_forwards import patched_forwards
from swlora.kernels.rotary import RotaryLengths
from swlora.kernels.tree_attention import TreeLayout, tree_attention
from swlora.models.anatomy import Anatomy


class _PrefixDoneError(Exception):
    """Carries the hidden state out of the model's forward at the cut."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class SplitModel:
    """Runs a causal language model's decoder over tree rows, whole or in two parts.

    `cut` is the lowest adapted block: blocks below it see no gradient.
    """

    def __init__(self, base_model: Any, cut: int) -> None:
        self.anatomy = Anatomy(base_model)
        self.base_model = base_model
        self.cut = cut
        self.rotary = RotaryLengths(base_model)

    def prefix(self, layout: TreeLayout) -> Tensor:
        """Return the hidden state at the input of block `cut`, (1, T, D), without a graph."""

        def stop(hidden: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
            raise _PrefixDoneError(hidden)

        at_cut = {self.anatomy.blocks[self.cut]: stop}
        with torch.no_grad(), patched_forwards(at_cut), _followed(layout, n_blocks=self.cut):
            try:
                self._forward(layout)
            except _PrefixDoneError as done:
                return done.hidden
        raise AssertionError("the model's forward did not reach the block at the cut")

    def whole(self, layout: TreeLayout) -> Tensor:
        """Return the final normed hidden state (1, T, D), nothing cut."""
        with _followed(layout, n_blocks=self.anatomy.n_layers):
            return self._forward(layout)

    def suffix(self, layout: TreeLayout, hidden: Tensor) -> Tensor:
        """Return the final normed hidden state (1, T, D) from the state at the cut."""
        block = self.anatomy.blocks[self.cut]
        forward = block.forward

        def enter(_hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return forward(hidden, *args, **kwargs)

        below = {skipped: _hand_through for skipped in self.anatomy.blocks[: self.cut]}
        n_blocks = self.anatomy.n_layers - self.cut
        with patched_forwards({**below, block: enter}), _followed(layout, n_blocks=n_blocks):
            return self._forward(layout)

    def _forward(self, layout: TreeLayout) -> Tensor:
        shortest, longest = layout.sequence_tokens
        if self.rotary.side(shortest) != self.rotary.side(longest):
            raise RunFailedError(
                f"a row has sequences of {shortest} and of {longest} tokens, whose rotary "
                "frequencies differ, so the loss would be wrong"
            )
        turned = self.rotary.of(longest)
        with tree_attention(self.base_model.config), layout.active(), turned:
            out = self.anatomy.backbone(
                input_ids=layout.token_ids, position_ids=layout.position_ids, use_cache=False
            )
        return out[0]  # type: ignore[no-any-return]


@contextmanager
def _followed(layout: TreeLayout, *, n_blocks: int) -> Iterator[None]:
    """Make sure that the attention of `n_blocks` blocks followed the layout in the body.

    A block with a configuration of its own would attend as if the row were one sequence.
    """
    n_before = layout.n_attentions
    yield
    n_followed = layout.n_attentions - n_before
    if n_followed != n_blocks:
        raise RunFailedError(
            f"{n_followed} of {n_blocks} blocks attend along tree rows, so the loss would be "
            "wrong; this model needs --engine plain"
        )


def _hand_through(hidden: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return hidden
