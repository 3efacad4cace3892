"""An adapter on its base model: the one it was trained on where none is named, and known again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from swlora.adapters.saved import (
    TOKENIZER_CONFIG,
    adapter_folder,
    load_adapter,
    read_config,
    read_facts,
)
from swlora.config import BUILTIN_MODEL, ModelSpec, load_spec
from swlora.errors import UserError
from swlora.models.identity import weights_sample_sha256
from swlora.models.load import LoadedModel, load_model
from swlora.paths import expanded, may_be_path


def load_with_adapter(
    spec: ModelSpec, adapter: Path | None, say: Callable[[str], None]
) -> LoadedModel:
    """Load a model, and the adapter in a folder (a run folder will do) on it if one is named.

    Without a name in `spec`, the model is the one that the adapter was trained on. Raises what
    `load_model` and `load_adapter` raise; what lacks in the folder first.
    """
    folder = adapter_folder(adapter) if adapter else None
    loaded = load_model(spec if folder is None else adapted_spec(folder, spec))
    say(f"model: {loaded.source}")
    return loaded if folder is None else with_adapter(loaded, folder, say)


def with_adapter(loaded: LoadedModel, folder: Path, say: Callable[[str], None]) -> LoadedModel:
    """Return a loaded model with the adapter in `folder` on it; see `load_adapter` for errors.

    Says so where the adapter was trained on other weights.
    """
    warn_of_other_base(folder, loaded.source, weights_sample_sha256(loaded.model), say)
    return replace(
        loaded, model=load_adapter(loaded.model, folder), adapter_facts=read_facts(folder)
    )


def warn_of_other_base(folder: Path, source: str, sample: str, say: Callable[[str], None]) -> None:
    """Say so where the adapter was trained on other weights than those it is to be used with.

    `source` names the model at hand, `sample` is its `weights_sample_sha256`. Other shapes are
    refused by `load_adapter`; other weights may be right, as those of the same model in another
    format are, so they are no error.
    """
    facts = read_facts(folder)
    trained_on = facts.get("base_weights_sample_sha256")
    if trained_on in (None, sample):
        return
    say(
        f"warning: the adapter in {folder} was trained on {facts.get('base_model')}, read from "
        f"{facts.get('base_read_from')} (sample of its weights: {str(trained_on)[:12]}), and this "
        f"is {source} ({sample[:12]}): unless that is the same model in another format, what they "
        "say together means little"
    )


def adapted_spec(adapter: Path, spec: ModelSpec) -> ModelSpec:
    """Return `base_spec` with the tokenizer beside the adapter, which it was trained with.

    One that `spec` names itself stays. Raises what `base_spec` raises.
    """
    base = base_spec(adapter, spec)
    return base if spec.tokenizer is not None else with_own_tokenizer(adapter, base)


def with_own_tokenizer(adapter: Path, spec: ModelSpec) -> ModelSpec:
    """Return `spec` with the tokenizer beside an adapter, where there is one."""
    has_own = (adapter / TOKENIZER_CONFIG).is_file()
    return spec.model_copy(update={"tokenizer": str(adapter)}) if has_own else spec


def base_spec(adapter: Path, spec: ModelSpec) -> ModelSpec:
    """Return `spec` with the model that an adapter's files name, where it names none itself.

    Tokenizer and revision that it names stay. Raises UserError where no such model is found.
    """
    if "name" in spec.model_fields_set:
        return spec
    recorded, given = _recorded_base(adapter), spec.model_fields_set
    return spec.model_copy(update={n: v for n, v in recorded.items() if n not in given})


def _recorded_base(adapter: Path) -> dict[str, Any]:
    """Return name and revision of the model that an adapter's files name."""
    facts, config = read_facts(adapter), read_config(adapter)
    if facts.get("base_flag") == BUILTIN_MODEL:
        return {"name": BUILTIN_MODEL}
    if facts.get("base_on_hub"):
        return {"name": facts["base_model"], "revision": facts.get("base_revision")}
    run_settings = adapter.parent / "config.yaml"
    if run_settings.is_file():  # the adapter lies in the folder of its run
        of_run = load_spec(run_settings, {}).model
        if expanded(of_run.name).exists():
            return {"name": of_run.name, "tokenizer": of_run.tokenizer}
    name = config.get("base_model_name_or_path")
    is_local = isinstance(name, str) and may_be_path(name) and Path(name).exists()
    if is_local or (isinstance(name, str) and name.count("/") == 1 and not facts):
        return {"name": name, "revision": None if is_local else config.get("revision")}
    raise UserError(
        f"{adapter} was trained on {str(name or 'a model that it does not name')[:100]}, which is "
        "not found from here; say where it is with --model"
    )
