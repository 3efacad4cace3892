"""Adapters by name, built by PEFT so that every other tool can use them.

LoRA (arXiv 2106.09685, eq. 3): y = W x + (alpha / r) B A x with A (r, in) random, B (out, r) zero.
Adapter weights are float32 whatever the model's dtype.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from swlora.config import AdapterSpec
from swlora.errors import UserError
from swlora.models.anatomy import Anatomy

ALL_LINEAR = "all-linear"


def attach(model: Any, spec: AdapterSpec, layers: Sequence[int], *, seed: int) -> Any:
    """Wrap `model` in a PeftModel with trainable adapters in `layers` only.

    The initial values depend on `seed` alone.
    Raises UserError where a target name or a layer matches no projection.
    """
    from peft import get_peft_model

    anatomy = Anatomy(model)
    targets = resolve_targets(anatomy, spec.targets)
    config = METHODS[spec.method](spec, anatomy, targets, list(layers))
    with torch.random.fork_rng(devices=[]), quiet_peft():
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, config)
    n_expected = len(targets) * len(layers)
    n_adapted = len(adapted_modules(peft_model))
    if n_adapted != n_expected:
        raise UserError(f"{n_adapted} modules were adapted where {n_expected} were expected")
    return peft_model


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence what PEFT warns of and the user cannot act on: a renamed attribute that it reads,
    and adapter tensors that are missing, which `load_adapter` refuses.
    """
    with warnings.catch_warnings():
        message = "`is_gradient_checkpointing` is deprecated"
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        yield


def resolve_targets(anatomy: Anatomy, names: Sequence[str]) -> list[str]:
    """Return projection names, relative to a block, for `all-linear`, full or last names.

    A last name that is used twice in a block (GPT-2's `c_proj`) selects both, as in PEFT.
    """
    known = anatomy.family.projections
    if ALL_LINEAR in names:
        return list(known)
    chosen: list[str] = []
    for name in names:
        matches = [p for p in known if p == name or p.endswith(f".{name}")]
        if not matches:
            raise UserError(
                f"no projection is called {name!r}; this model has {', '.join(known)}, "
                f"or {ALL_LINEAR} for all"
            )
        chosen += [match for match in matches if match not in chosen]
    return [name for name in known if name in chosen]


def adapted_modules(peft_model: Any) -> dict[str, nn.Module]:
    """Return the wrapped projections of a PeftModel by their full names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {n: m for n, m in peft_model.named_modules() if isinstance(m, BaseTunerLayer)}


def adapted_layers(peft_model: Any) -> list[int]:
    """Return the sorted numbers of the blocks that hold an adapter."""
    anatomy = Anatomy(peft_model.get_base_model())
    wrapped = {id(module) for module in adapted_modules(peft_model).values()}
    return [
        layer
        for layer, block in enumerate(anatomy.blocks)
        if any(id(module) in wrapped for module in block.modules())
    ]


def trainable_parameters(peft_model: Any) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name, in a fixed order."""
    return {n: p for n, p in peft_model.named_parameters() if p.requires_grad}


def train_mode(peft_model: Any) -> None:
    """Switch on the adapter's own dropout only; the frozen model stays deterministic."""
    peft_model.eval()
    for module in adapted_modules(peft_model).values():
        dropouts = getattr(module, "lora_dropout", None)
        if dropouts is not None:
            dropouts.train()


def _lora_config(spec: AdapterSpec, anatomy: Anatomy, targets: list[str], layers: list[int]) -> Any:
    from peft import LoraConfig

    some_layers = len(layers) < anatomy.n_layers
    is_conv1d = isinstance(anatomy.projection(0, targets[0]), Conv1D)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=targets,
        layers_to_transform=layers if some_layers else None,
        layers_pattern=anatomy.family.blocks if some_layers else None,
        fan_in_fan_out=is_conv1d,
    )


METHODS: dict[str, Callable[[AdapterSpec, Anatomy, list[str], list[int]], Any]] = {
    "lora": _lora_config,
}
