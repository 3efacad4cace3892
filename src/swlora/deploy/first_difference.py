"""Where two models begin to differ: the first module whose output is another."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swlora.adapters.base_model import base_model_of
from swlora.deploy.in_float32 import has_weights

N_TOKENS = 32


@dataclass(frozen=True)
class Difference:
    """A module, and |y - y'| / |y| of its outputs."""

    module: str
    relative: float


@torch.no_grad()
def first_difference(
    reference: Any, model: Any, token_ids: Tensor, limit: float
) -> Difference | None:
    """Return the first module, in the order they run, whose output differs by more than `limit`.

    `reference` may be a PeftModel; the other is plain. Of `token_ids` (n, T) the first N_TOKENS of
    one text are run. None where no module differs so much.
    """
    names = [name for name, module in model.named_modules() if has_weights(module)]
    text, base = token_ids[:1, :N_TOKENS], base_model_of(reference)
    outputs: dict[str, Tensor] = {}
    with _watched(model, names, outputs.__setitem__):
        model(input_ids=text)
    differences: list[Difference] = []

    def compare(name: str, expected: Tensor) -> None:
        if name in outputs:
            distance = torch.linalg.vector_norm(expected - outputs[name])
            relative = float(distance / torch.linalg.vector_norm(expected).clamp(min=1e-30))
            differences.append(Difference(name, relative))

    with _watched(base, names, compare):
        reference(input_ids=text)
    return next((d for d in differences if not d.relative <= limit), None)


@contextmanager
def _watched(
    model: nn.Module, names: list[str], note: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Note the output of every named module while the body runs."""
    with ExitStack() as hooks:
        for name in names:
            try:
                module = model.get_submodule(name)
            except AttributeError:
                continue
            handle = module.register_forward_hook(
                lambda _module, _args, output, name=name: note(name, _tensor(output).float())
            )
            hooks.callback(handle.remove)
        yield


def _tensor(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor
