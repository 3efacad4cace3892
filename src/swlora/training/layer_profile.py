"""What each layer costs and may bring: seconds and gradients, measured over a few steps.

A step runs backward through every block above the lowest adapted one, so adapters in all of these
cost little more, and the question is only where to begin. With f, c, h the seconds that an example
takes in a frozen block, a trained block and the head, E epochs over cached prefixes with adapters
in the layers from l up (of n) take, for each example,

    T(l) = l f + E ((n - l) c + h)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from swlora.adapters.adapted import Adapted
from swlora.adapters.methods import adapt, train_mode
from swlora.config import TRIED_AS_THEMSELVES, AdapterSpec, RunSpec
from swlora.data.prefix_tree import build_tree
from swlora.data.token_sequences import TokenSequences
from swlora.errors import UserError
from swlora.kernels.device_clock import DeviceClock
from swlora.kernels.forwards import fast_forwards
from swlora.kernels.patched_forwards import patched_forwards
from swlora.kernels.tree_layout import TreeLayout
from swlora.kernels.tree_walk import TreeWalk
from swlora.models.anatomy import Anatomy
from swlora.threads import adapt_threads
from swlora.training.fitting import fit_trial
from swlora.training.frozen_prefix import GIB, n_cache_bytes
from swlora.training.schedule import Schedule, Step
from swlora.training.step import TreeStep, tree_nats


@dataclass(frozen=True)
class LayerProfile:
    """What was measured: gradients' L1 norms by layer (nats a token and unit of rate), and the
    seconds that an example takes in the head, a frozen block and a trained block.

    `is_cached` says whether later epochs read the states below the lowest adapted layer.
    """

    gradient_norms: list[float]
    head_s: float
    frozen_block_s: float
    trained_block_s: float
    is_cached: bool = True

    @property
    def n_layers(self) -> int:
        """The number of the model's blocks."""
        return len(self.gradient_norms)

    @property
    def forward_s(self) -> float:
        """The seconds that the loss of an example takes, without a gradient in the blocks."""
        return self.n_layers * self.frozen_block_s + self.head_s

    def pass_s(self, lowest: int, *, is_first: bool) -> float:
        """Return the seconds an example takes in an epoch, with adapters from layer `lowest` up."""
        prefix_s = lowest * self.frozen_block_s if is_first or not self.is_cached else 0.0
        return prefix_s + (self.n_layers - lowest) * self.trained_block_s + self.head_s

    def training_s(self, lowest: int, n_epochs: float) -> float:
        """Return the seconds an example takes over `n_epochs` epochs, one at least."""
        later_s = self.pass_s(lowest, is_first=False)
        return self.pass_s(lowest, is_first=True) + max(0.0, n_epochs - 1) * later_s


def check_trees(anatomy: Anatomy, flag: str) -> None:
    """Raise UserError where nothing can be measured for a flag: the family cannot run trees."""
    if not anatomy.family.has_attention_interface:
        raise UserError(f"{flag} needs prefix trees, which this family cannot run")


def tried_as(spec: AdapterSpec) -> AdapterSpec:
    """Return the adapter that stands for `spec` in a trial: LoRA for a method that costs more."""
    method = spec.method if spec.method in TRIED_AS_THEMSELVES else "lora"
    return spec.model_copy(update={"method": method})


@contextmanager
def temporary_adapters(
    model: Any, spec: AdapterSpec, layers: Sequence[int], seed: int
) -> Iterator[Adapted]:
    """Put the adapters of `spec` on a base model while the body runs.

    Its weights are the same to the last bit afterwards. Raises UserError where they do not fit.
    """
    adapted = adapt(model, spec, layers, seed=seed)
    train_mode(adapted.model)
    try:
        yield adapted
    finally:
        adapted.model.unload()


def profile(
    model: Any,
    sequences: TokenSequences,
    spec: RunSpec,
    steps: Sequence[Step],
    say: Callable[[str], None],
) -> LayerProfile:
    """Measure a base model on `steps`, with LoRA of the size that `spec` asks for in all layers."""
    lora = spec.adapter.model_copy(update={"method": "lora"})
    every_layer = range(int(model.config.num_hidden_layers))
    with temporary_adapters(model, lora, every_layer, spec.seed) as adapted:
        step = TreeStep(adapted.model, sequences, say=say)
        planned = [list(groups) for groups in steps]
        fit_trial(step, Schedule(spec.train, lambda _epoch: planned, len(planned)), say)
        parameters = list(adapted.parameters.values())
        step(steps[0])  # memory and kernels warm up
        _clear_gradients(parameters)
        whole, frozen, head = DeviceClock(), DeviceClock(), DeviceClock()
        n_tokens, n_examples = 0.0, 0
        for groups in steps:  # whole and in parts one after the other: other programs come and go
            adapt_threads()
            with whole.running(step.base_model.device):
                n_tokens += step(groups).n_tokens
            _run_parts(step, groups, frozen, head)
            n_examples += sum(map(len, groups))
        norms = _gradient_norms(step.walk, parameters, n_tokens)
    is_cached = spec.train.engine != "plain" and (
        n_cache_bytes(model, sequences) <= spec.train.cache_gb * GIB
    )
    n_blocks = n_examples * len(norms)
    trained_s = max(0.0, whole.seconds - head.seconds)
    return LayerProfile(
        norms,
        head.seconds / n_examples,
        frozen.seconds / n_blocks,
        trained_s / n_blocks,
        is_cached,
    )


def _run_parts(step: TreeStep, groups: Step, frozen: DeviceClock, head: DeviceClock) -> None:
    """Time all blocks without a graph, and the head with its gradient."""
    walk, device = step.walk, step.base_model.device
    with patched_forwards(fast_forwards(walk.base_model)):
        for ids in step.parts(groups):
            tree = build_tree(step.sequences, ids)
            layout = TreeLayout(tree, device)
            with frozen.running(device), torch.no_grad():
                hidden = walk.whole(layout)
            with head.running(device):
                tree_nats(walk, tree, hidden.requires_grad_())


def _gradient_norms(walk: TreeWalk, parameters: Sequence[Any], n_tokens: float) -> list[float]:
    """Return the L1 norm of the gradient in each block, in nats a token and unit of rate."""
    blocks = walk.anatomy.blocks
    layer_of = {id(p): layer for layer, block in enumerate(blocks) for p in block.parameters()}
    norms = np.zeros(len(blocks))
    for parameter in parameters:
        if parameter.grad is not None and id(parameter) in layer_of:
            norms[layer_of[id(parameter)]] += float(parameter.grad.abs().sum()) / n_tokens
    return [float(norm) for norm in norms]


def _clear_gradients(parameters: Sequence[Any]) -> None:
    for parameter in parameters:
        parameter.grad = None
