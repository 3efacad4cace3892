"""Adapters by name, built by PEFT so that every other tool can use them.

LoRA (arXiv 2106.09685, eq. 3): y = W x + (alpha / r) B A x with A (r, in) random, B (out, r) zero.
DoRA (2402.09353) gives every output channel a trained magnitude; rsLoRA (2312.03732) scales by
alpha / sqrt(r); Super-Tuning (2607.09287) trains the largest scalars of each weight. Trained
weights are float32 whatever the model's dtype.

A new method is an entry of METHODS, and its name and settings in `swlora.config`.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from swlora.adapters import adalora, full
from swlora.adapters.adapted import Adapted, LoraPlus, trainable_parameters
from swlora.adapters.pissa import Pissa
from swlora.adapters.site import Site
from swlora.config import AdapterSpec
from swlora.errors import UserError
from swlora.models.anatomy import Anatomy
from swlora.models.linear_maps import is_linear_map, shape_out_in
from swlora.models.quantised_weight import is_quantised
from swlora.random_numbers import drawing_by

__all__ = [
    "METHODS",
    "Method",
    "adapt",
    "adapted_layers",
    "adapted_modules",
    "problems_of_fit",
    "quiet_peft",
    "resolve_targets",
    "train_mode",
    "trainable_parameters",
]

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Method:
    """How one method is built and trained.

    `config` makes PEFT's configuration, `adapted` what the training does besides descending,
    `first_rank` the rank it starts with, or None for a method that has none. `linear_only` methods
    know nn.Linear and not GPT-2's Conv1D; those with `changes_weights` train or replace the model's
    own weights, or parts of them.
    """

    config: Callable[[AdapterSpec, Site], Any]
    adapted: type[Adapted] = Adapted
    first_rank: Callable[[AdapterSpec], int] | None = lambda spec: spec.rank
    linear_only: bool = False
    changes_weights: bool = False


def adapt(
    model: Any,
    spec: AdapterSpec,
    layers: Sequence[int],
    *,
    seed: int,
    n_steps: int | None = None,
) -> Adapted:
    """Wrap `model` in a PeftModel with what `spec` trains, in `layers` only.

    The initial values depend on `seed` alone. `n_steps` are the optimizer steps to come, which
    adalora needs. Raises UserError where the method does not fit the model, all reasons at once.
    """
    from peft import get_peft_model

    method = METHODS[spec.method]
    site, config = check_fit(Anatomy(model), spec, layers, n_steps=n_steps)
    with drawing_by(seed, model.device), quiet_peft():
        adapted = method.adapted(get_peft_model(model, config), spec)
    n_expected, n_adapted = len(site.modules), len(adapted_modules(adapted.model))
    if n_adapted != n_expected:
        raise UserError(f"{n_adapted} modules were adapted where {n_expected} were expected")
    return adapted


def count_trainable(
    skeleton: Any, spec: AdapterSpec, layers: Sequence[int], *, n_steps: int
) -> int | None:
    """Put what `spec` trains into a model without its weights, and count its weights.

    None where the weights are needed for that, as PiSSA decomposes them. Raises as `adapt` does.
    """
    try:
        adapted = adapt(skeleton, spec, layers, seed=0, n_steps=n_steps)
    except (RuntimeError, NotImplementedError):
        return None
    return sum(parameter.numel() for parameter in adapted.parameters.values())


def check_fit(
    anatomy: Anatomy, spec: AdapterSpec, layers: Sequence[int], *, n_steps: int | None
) -> tuple[Site, Any]:
    """Return where the adapter goes and PEFT's configuration of it.

    Raises UserError where the method does not fit the model, all reasons at once.
    """
    problems = problems_of_fit(spec, anatomy, layers)
    if problems:
        raise UserError("; ".join(problems))
    site = Site(anatomy, resolve_targets(anatomy, spec.targets), list(layers), n_steps)
    return site, METHODS[spec.method].config(spec, site)


def problems_of_fit(spec: AdapterSpec, anatomy: Anatomy, layers: Sequence[int]) -> list[str]:
    """Return every reason why `spec` cannot work in these layers of a model; empty if it can."""
    try:
        site = Site(anatomy, resolve_targets(anatomy, spec.targets), list(layers))
        modules = site.modules
    except UserError as error:
        return [str(error)]
    method, problems = METHODS[spec.method], []
    others = {type(m).__name__ for m in modules.values() if not isinstance(m, nn.Linear)}
    if method.linear_only and others:
        problems.append(
            f"{spec.method} works on nn.Linear only, and this model has {', '.join(sorted(others))}"
        )
    if method.changes_weights and any(map(is_quantised, modules.values())):
        problems.append(
            f"{spec.method} changes the model's own weights, and they stay as they lie in the "
            ".gguf file; give --frozen dequantised"
        )
    packed = {type(m).__name__ for m in modules.values() if not is_linear_map(m)}
    if method.changes_weights and packed:
        problems.append(
            f"{spec.method} changes the model's own weights, and this model has them in "
            f"{', '.join(sorted(packed))}, a form of another library; choose lora, or a model that "
            "is not quantised"
        )
    if method.first_rank is not None:
        rank = method.first_rank(spec)
        sides = {name: min(shape_out_in(module)) for name, module in modules.items()}
        narrow = min(sides, key=lambda name: sides[name])
        if rank > sides[narrow]:
            problems.append(
                f"{spec.method} with --rank {spec.rank} starts at rank {rank}, and the smaller "
                f"side of {narrow} is {sides[narrow]}; lower --rank"
            )
    return problems


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence what PEFT warns of and the user cannot act on: a renamed attribute that it reads,
    adapter tensors that are missing, which `load_adapter` refuses, what a merge would do, and what
    AdaLoRA leaves behind: ranks, which it takes for LoRA's and then uses, and matrices without any.
    """
    with warnings.catch_warnings():
        message = "`is_gradient_checkpointing` is deprecated"
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
        warnings.filterwarnings("ignore", message=r"Adapter .* tensor\(s\) have invalid shape")
        yield


def resolve_targets(anatomy: Anatomy, names: Sequence[str]) -> list[str]:
    """Return projection names, relative to a block, for `all-linear`, full or last names.

    A last name that is used twice in a block (GPT-2's `c_proj`) selects both, as in PEFT. Raises
    UserError for a name that selects none, also beside `all-linear`.
    """
    known = anatomy.family.projections
    chosen: list[str] = []
    for name in names:
        matches = [p for p in known if name in (ALL_LINEAR, p) or p.endswith(f".{name}")]
        if not matches:
            raise UserError(
                f"no projection is called {name!r}; this model has {', '.join(known)}, "
                f"or {ALL_LINEAR} for all"
            )
        chosen += [match for match in matches if match not in chosen]
    return [name for name in known if name in chosen]


def adapted_modules(peft_model: Any) -> dict[str, nn.Module]:
    """Return what PEFT put in the place of projections, by their full names."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    kinds = (BaseTunerLayer, ModulesToSaveWrapper)
    return {n: m for n, m in peft_model.named_modules() if isinstance(m, kinds)}


def adapted_layers(peft_model: Any) -> list[int]:
    """Return the sorted numbers of the blocks that hold an adapter."""
    anatomy = Anatomy(peft_model.get_base_model())
    wrapped = {id(module) for module in adapted_modules(peft_model).values()}
    return [
        layer
        for layer, block in enumerate(anatomy.blocks)
        if any(id(module) in wrapped for module in block.modules())
    ]


def train_mode(peft_model: Any) -> None:
    """Switch on the adapter's own dropout only; the frozen model stays deterministic."""
    peft_model.eval()
    for module in adapted_modules(peft_model).values():
        dropouts = getattr(module, "lora_dropout", None)
        if dropouts is not None:
            dropouts.train()
        if getattr(module, "lora_magnitude_vector", None):
            module.training = True  # where PEFT's DoRA looks for whether its dropout is on


def _lora(spec: AdapterSpec, site: Site, **settings: Any) -> Any:
    from peft import LoraConfig

    sizes = {"r": spec.rank, "lora_alpha": spec.alpha, "lora_dropout": spec.dropout}
    return site.config(LoraConfig, **sizes, **settings)


def _supertuning(spec: AdapterSpec, site: Site) -> Any:
    from peft import SupertuningConfig

    given = {} if spec.sparsity is None else {"sparsity": spec.sparsity}
    return site.config(SupertuningConfig, **given)


METHODS: dict[str, Method] = {
    "lora": Method(_lora),
    "lora+": Method(_lora, LoraPlus),
    "dora": Method(partial(_lora, use_dora=True)),
    "adalora": Method(adalora.config, adalora.AdaLora, first_rank=adalora.first_rank),
    "pissa": Method(_lora, Pissa, changes_weights=True),
    "rslora": Method(partial(_lora, use_rslora=True)),
    "full": Method(full.config, full.Full, first_rank=None, changes_weights=True),
    "supertuning": Method(_supertuning, first_rank=None, linear_only=True, changes_weights=True),
}
