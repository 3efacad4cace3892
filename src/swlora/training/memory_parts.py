"""The memory of a whole training by its parts, known before its first step.

    peak = process + weights + copies + adapter + the largest of (step, states below, held-out rows,
           checkpoint)

The last four are never there at once, and what one lets go of the next one takes. The first part is
measured: what the process holds when everything is loaded, less the weights.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import psutil
from torch import Tensor, nn

from swlora.adapters.adapted import Adapted
from swlora.kernels.linear.frozen import FrozenLinear
from swlora.kernels.lora import FastLora
from swlora.memory import kept_for_steps, peak_memory_bytes
from swlora.models.anatomy import Anatomy
from swlora.models.quantised_weight import QuantisedWeight
from swlora.training.fitting import Fitted
from swlora.training.step import TreeStep
from swlora.training.step_memory import head_bytes, measured_without_graph, rough_memory_of


@dataclass(frozen=True)
class MemoryParts:
    """Bytes of the parts; `peak_bytes` is the sum in the header, or what was reached before.

    `copies_bytes` are those of weights in the kernels' layout. `adapter_bytes` has gradients, the
    optimizer's moments and what the method keeps. `step_bytes` are those of the largest tree,
    `step_tokens` its nodes; `head_bytes` of them are its logits. `below_bytes` is the pass through
    the blocks below the lowest adapted one.
    """

    peak_bytes: int
    process_bytes: int
    weights_bytes: int
    copies_bytes: int
    adapter_bytes: int
    step_bytes: int
    step_tokens: int
    head_bytes: int
    below_bytes: int
    held_out_bytes: int
    checkpoint_bytes: int
    free_bytes: int

    @property
    def in_turns(self) -> list[tuple[str, int]]:
        """What is never there at once, in words and bytes."""
        return [
            ("largest step", self.step_bytes),
            ("states below the adapter", self.below_bytes),
            ("held-out rows", self.held_out_bytes),
            ("checkpoint", self.checkpoint_bytes),
        ]


@dataclass(frozen=True)
class Passes:
    """Nodes of the largest trees that are run without a gradient; 0 where there are none."""

    below: int
    held_out: int


def resident_bytes() -> int:
    """Return what this process holds of the memory now."""
    return int(psutil.Process().memory_info().rss)


def memory_parts(
    step: TreeStep,
    adapted: Adapted,
    fitted: Fitted,
    passes: Passes,
    *,
    held_bytes: int,
    copies_limit_bytes: int,
    has_checkpoint: bool,
    free_bytes: int,
) -> MemoryParts:
    """Return the parts; `held_bytes` is what the process held when everything was loaded.

    `fitted` is what its largest step takes, `copies_limit_bytes` what copies of weights may.
    """
    trained = sum(p.nbytes for p in adapted.parameters.values())
    weights = weights_bytes(step.base_model)
    own = max(0, held_bytes - weights - trained)
    copies = copies_bytes(step, copies_limit_bytes)
    adapter = 4 * trained + 3 * adapted.score_bytes
    checkpoint = 3 * trained + 2 * adapted.score_bytes if has_checkpoint else 0
    below, held_out = _without_graph_bytes(step, passes, fitted)
    largest = max(fitted.needed_bytes, below, held_out, checkpoint)
    peak = own + weights + copies + adapter + largest
    return MemoryParts(
        peak_bytes=max(peak, peak_memory_bytes("cpu")),
        process_bytes=own,
        weights_bytes=weights,
        copies_bytes=copies,
        adapter_bytes=adapter,
        step_bytes=fitted.needed_bytes,
        step_tokens=fitted.n_nodes,
        head_bytes=head_bytes(step),
        below_bytes=below,
        held_out_bytes=held_out,
        checkpoint_bytes=checkpoint,
        free_bytes=free_bytes,
    )


def _without_graph_bytes(step: TreeStep, passes: Passes, fitted: Fitted) -> tuple[int, int]:
    """Return what the passes without a gradient take; roughly, where the step takes more."""
    sizes = passes.below, passes.held_out
    memory = rough_memory_of(step.base_model.config, 0, int(step.base_model.dtype.itemsize))
    if max(memory.peak_bytes(n) for n in sizes) > fitted.needed_bytes:
        with kept_for_steps(None):
            memory = measured_without_graph(step)
    below, held_out = (memory.peak_bytes(n) if n else 0 for n in sizes)
    return below, held_out


def weights_bytes(base_model: Any) -> int:
    """Return the bytes of the frozen weights, shared ones once, and as they lie in a .gguf file."""
    return sum({data.data_ptr(): data.nbytes for data in _frozen_data(base_model)}.values())


def _frozen_data(base_model: Any) -> Iterable[Tensor]:
    for parameter in base_model.parameters():
        if isinstance(parameter, QuantisedWeight):
            yield parameter.matrix.blocks
        elif not parameter.requires_grad:
            yield parameter


def copies_bytes(step: TreeStep, limit_bytes: int) -> int:
    """Return the bytes of the copies that a training makes of weights, where they find room.

    Each is asked for when it is first used: the head's, those of forward, those of backward.
    """
    anatomy = step.walk.anatomy
    (head,) = _copies_of(step, [anatomy.head]) or [0]
    of_block = [_copies_of(step, block.modules()) for block in anatomy.blocks]
    forward = [n_bytes for own in of_block for n_bytes in own]
    backward = [n_bytes for own in reversed(of_block[step.walk.cut :]) for n_bytes in own]
    total = 0
    for n_bytes in (head, head, *forward, *backward):
        total += n_bytes if total + n_bytes <= limit_bytes else 0
    return total


def _copies_of(step: TreeStep, modules: Iterable[nn.Module]) -> list[int]:
    """Return the bytes of a copy of each frozen map among modules; an adapter's is its base's."""
    forwards = [step.forwards.get(module) for module in modules]
    frozen = [f.frozen if isinstance(f, FastLora) else f for f in forwards]
    maps = {id(f): f.copy_bytes for f in frozen if isinstance(f, FrozenLinear)}
    return list(maps.values())


def adapted_maps(anatomy: Anatomy, modules: Iterable[str]) -> dict[str, int]:
    """Count the adapted maps by their names within a block, in the order of the block."""
    names = list(modules)
    counts = {
        name: sum(full.endswith(f".{name}") for full in names)
        for name in anatomy.family.projections
    }
    return {name: n for name, n in counts.items() if n}
