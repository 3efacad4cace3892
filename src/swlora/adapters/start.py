"""A training that starts from an adapter: its settings as its files say them, and it on its model.

What PEFT loads with `is_trainable=True` is trained on. Settings that are the adapter's own (method,
rank, alpha, targets, layers, sparsity) come from its files; how it is trained is the new run's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from swlora.adapters.adapted import Adapted
from swlora.adapters.card import START
from swlora.adapters.methods import METHODS, quiet_peft, resolve_targets
from swlora.adapters.reach import is_covered, switch_refusal
from swlora.adapters.saved import (
    WEIGHTS,
    adapter_folder,
    load_trainable,
    read_config,
    read_facts,
)
from swlora.config import AdapterSpec, settings_of
from swlora.errors import UserError
from swlora.files import sha256_of
from swlora.layer_policy import parse_policy
from swlora.models.anatomy import Anatomy
from swlora.random_numbers import drawing_by
from swlora.settings import flag_name, problem_lines

PREFIX = "base_model.model."  # of PEFT's names
OPTIMISED_ALIKE = {"lora": ("lora", "lora+")}  # methods that save the same adapter
TRAINING_SETTINGS = frozenset({"dropout", "lora_plus_ratio"})  # the adapter does not depend on them


def settled_start(spec: AdapterSpec, anatomy: Anatomy) -> AdapterSpec:
    """Return `spec` with the settings of the adapter that it starts from; as it is without one.

    Raises UserError where that adapter cannot be trained on, does not fit the model, or is another
    than the settings that were given say.
    """
    if spec.start is None:
        return spec
    folder = adapter_folder(spec.start)
    config, names = read_config(folder), _tensor_names(folder)
    method = _method(folder, config, names, spec)
    own = {"method": method, **_numbers(method, config), **_place(folder, names, anatomy)}
    _check_given(folder, spec, own, anatomy)
    if "dropout" in settings_of(method) and "dropout" not in spec.model_fields_set:
        own["dropout"] = config.get("lora_dropout") or 0.0
    if method == "lora+" and spec.lora_plus_ratio is None:
        own["lora_plus_ratio"] = read_facts(folder).get("settings", {}).get("lora_plus_ratio")
    given = {name: getattr(spec, name) for name in spec.model_fields_set}
    try:
        return AdapterSpec.model_validate(given | own)
    except ValidationError as error:
        raise _refused(folder, "; ".join(problem_lines(error, AdapterSpec))) from error


def start_from(model: Any, spec: AdapterSpec, *, seed: int) -> Adapted:
    """Put the adapter that a settled `spec` starts from into `model`, to be trained on.

    Raises UserError where it does not fit, or reaches beyond the projections of the blocks.
    """
    assert spec.start is not None
    folder = adapter_folder(spec.start)
    with drawing_by(seed, model.device), quiet_peft():  # the values that the saved ones replace
        dropout = {"lora_dropout": spec.dropout} if "dropout" in settings_of(spec.method) else {}
        peft_model = load_trainable(model, folder, dropout)
    if not is_covered(peft_model):
        raise _refused(folder, "it adapts more than the projections of the model's blocks")
    return METHODS[spec.method].adapted(peft_model, spec)


def check_start_base(spec: AdapterSpec, source: str, sample: str) -> None:
    """Raise UserError where the adapter to start from was trained on other weights than these.

    `source` names the model at hand, `sample` is its `weights_sample_sha256`.
    """
    if spec.start is None:
        return
    folder = adapter_folder(spec.start)
    facts = read_facts(folder)
    trained_on = facts.get("base_weights_sample_sha256")
    if trained_on not in (None, sample):
        raise UserError(
            f"the adapter in {folder} was trained on {facts.get('base_model')} (sample of its "
            f"weights: {str(trained_on)[:12]}), and this is {source} ({sample[:12]}); give --model "
            "that one, or, where these weights are meant, remove base_weights_sample_sha256 from "
            "its swlora.json"
        )


def start_facts(spec: AdapterSpec) -> dict[str, str]:
    """Return by what the adapter that a training starts from is known again; empty without one."""
    if spec.start is None:
        return {}
    return {START: sha256_of(adapter_folder(spec.start) / WEIGHTS)}


def _refused(folder: Path, reason: str) -> UserError:
    return UserError(f"no training starts from the adapter in {folder}: {reason}")


def _tensor_names(folder: Path) -> list[str]:
    from safetensors import safe_open

    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            return sorted(file.keys())
    except Exception as error:  # of the library's own kinds
        raise UserError(f"{folder / WEIGHTS} cannot be read: {error}") from error


def _method(folder: Path, config: Mapping[str, Any], names: list[str], spec: AdapterSpec) -> str:
    """Return the method that trains this adapter: as given, as it was trained, or as it is."""
    saved = _saved_method(folder, config, names)
    able = OPTIMISED_ALIKE.get(saved, (saved,))
    if "method" in spec.model_fields_set:
        if spec.method not in able:
            noted = read_facts(folder).get("method")
            was = f", saved by {noted}," if noted not in (None, *able) else ""
            raise UserError(
                f"--method {spec.method} conflicts with the adapter in {folder}, which{was} is "
                f"{saved}; leave it out"
            )
        return spec.method
    noted = read_facts(folder).get("method")
    return str(noted) if noted in able else saved


def _saved_method(folder: Path, config: Mapping[str, Any], names: list[str]) -> str:
    """Return the method of which an adapter's files are; UserError where none here trains it."""
    kind = config.get("peft_type")
    if kind == "SUPERTUNING":
        return "supertuning"
    if kind == "ADALORA":
        raise _refused(folder, "AdaLoRA's ranks are pruned, and what chose them is not saved")
    if kind == "LORA" and config.get("modules_to_save") and not any(".lora_" in n for n in names):
        return "full"
    if reason := switch_refusal(config):
        raise _refused(folder, reason.replace("served", "trained on"))
    if config.get("use_dora") and config.get("use_rslora"):
        raise _refused(folder, "DoRA with rsLoRA's scale is no method here")
    for other in ("use_qalora", "use_bdlora", "lora_bias"):
        if config.get(other):
            raise _refused(folder, f"it is a kind of LoRA that is no method here ({other})")
    return "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"


def _numbers(method: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of an adapter as settings."""
    if method == "full":
        return {}
    if method == "supertuning":
        return {"sparsity": config.get("sparsity")}
    return {"rank": config.get("r"), "alpha": config.get("lora_alpha")}


def _place(folder: Path, names: list[str], anatomy: Anatomy) -> dict[str, Any]:
    """Return the targets and layers of an adapter, by the names of its tensors."""
    found, rest = dict[str, tuple[int, str]](), set(names)
    for projection in anatomy.all_projections():
        own = {name for name in rest if name.startswith(f"{PREFIX}{projection.full_name}.")}
        if own:
            found[projection.full_name] = projection.layer, projection.name
            rest -= own
    if rest:
        name = min(rest).removeprefix(PREFIX)[:80]
        raise _refused(folder, f"{name} belongs to no projection of this model's blocks")
    layers = sorted({layer for layer, _ in found.values()})
    if not layers:
        raise _refused(folder, f"its {WEIGHTS} holds no tensor")
    policy = "all" if len(layers) == anatomy.n_layers else ",".join(map(str, layers))
    targets = resolve_targets(anatomy, sorted({name for _, name in found.values()}))
    return {"targets": targets, "layers": parse_policy(policy)}


def _check_given(folder: Path, spec: AdapterSpec, own: Mapping[str, Any], anatomy: Anatomy) -> None:
    """Raise UserError that names every setting that was given and is not the adapter's."""
    others = []
    for name in sorted(spec.model_fields_set - TRAINING_SETTINGS - {"start", "method"}):
        given, has = getattr(spec, name), own.get(name)
        unset = AdapterSpec.model_fields[name].get_default(call_default_factory=True)
        if given == has or (has is None and given == unset):
            continue
        is_same = name == "targets" and resolve_targets(anatomy, given) == has
        if name == "layers" and not given.needs_search:
            is_same = given.resolve(anatomy.n_layers) == own[name].resolve(anatomy.n_layers)
        if not is_same:
            flag = flag_name(f"adapter.{name}")
            shown = ",".join(has) if isinstance(has, list) else has
            others.append(f"{flag}, which is {shown} there" if has is not None else f"{flag}")
    if others:
        raise UserError(
            f"the adapter in {folder} brings its own settings; leave out {' and '.join(others)}"
        )
