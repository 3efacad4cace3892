"""Starts of an adapter other than PEFT's: A along the gradient, and the fixed A of MiSS."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from swlora.data.prefix_tree import build_tree
from swlora.data.token_sequences import TokenSequences
from swlora.kernels.forwards import fast_forwards
from swlora.kernels.patched_forwards import patched_forwards
from swlora.kernels.tree_layout import TreeLayout
from swlora.kernels.tree_walk import TreeWalk
from swlora.models.anatomy import Anatomy, weight_out_in
from swlora.training.schedule import Step
from swlora.training.step import tree_nats


def leading_inputs(
    model: Any, rows: TokenSequences, step: Step, rank: int
) -> dict[nn.Module, Tensor]:
    """Return by projection the leading right singular vectors of its gradient, (rank, in)."""
    projections = [p.module for p in Anatomy(model).all_projections()]
    walk, found = TreeWalk(model, 0), {}
    with _weights_trained(projections), patched_forwards(fast_forwards(model)):
        for ids in step:
            tree = build_tree(rows, ids)
            hidden = walk.whole(TreeLayout(tree, model.device))
            torch.autograd.backward(tree_nats(walk, tree, hidden))
        for module in projections:
            gradient = module.weight.grad
            assert weight_out_in(module).shape == gradient.shape
            torch.manual_seed(0)
            leading = torch.svd_lowrank(gradient.float(), q=rank + 20)[2]
            found[module] = leading[:, :rank].T.contiguous()
    return found


@contextmanager
def _weights_trained(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let the frozen weights of modules have gradients while the body runs."""
    for module in modules:
        module.weight.requires_grad_(True)
    try:
        yield
    finally:
        for module in modules:
            module.weight.requires_grad_(False)
            module.weight.grad = None


def sums_of_shards(rank: int, n_in: int) -> Tensor:
    """Return the A (rank, in) with which LoRA is MiSS: row i sums the inputs i, i + rank, ...

    MiSS (arXiv 2409.15371, PEFT's `MissConfig`) cuts the input into pieces of `rank`, adds them up
    and multiplies the sum by a trained (rank, out), which is LoRA with this A, fixed, and scale 1.
    """
    return (torch.arange(n_in) % rank == torch.arange(rank)[:, None]).float()
