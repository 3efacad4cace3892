"""A language model and its tokenizer from a Hub id, a local folder, a .gguf file or `builtin`.

Weights come from safetensors (or a GGUF file, read as data) only; code of a model repository is
never run. Where no model was named and the default cannot be had from the Hub, the embedded model
takes its place and `source` says so; a model that was named is loaded or refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swlora.config import BUILTIN_MODEL, ModelSpec
from swlora.errors import UserError, panic_named
from swlora.hub import cached_file, hub_reachable
from swlora.library_noise import quiet_libraries
from swlora.memory import keep_few_kernels, keep_freed_memory, limit_memory
from swlora.models.anatomy import context_tokens, family_of, n_embeddings
from swlora.models.declared_size import check_declared_size
from swlora.models.end_tokens import find_end_tokens
from swlora.models.finite import check_finite
from swlora.models.gguf_header import read_gguf_table
from swlora.models.model_folder import check_counts, check_model_folder
from swlora.models.precision import resolve_device, resolve_dtype
from swlora.models.skeleton import make_skeleton
from swlora.models.tokenizer_folder import TOKENIZER, check_added_tokens, check_tokenizer_folder
from swlora.models.weights_room import bytes_if_quantised, check_weights_fit, moved
from swlora.paths import expanded, may_be_path
from swlora.plural import counted
from swlora.threads import settle_threads


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for use, and where it came from (`revision` is a commit or None).

    A text ends at any of `end_token_ids`, which is no part of it. `adapter_facts` are what training
    noted of the adapter that is on the model; None without one.
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str | None
    source: str
    end_token_ids: tuple[int, ...]
    adapter_facts: Mapping[str, Any] | None = None

    @property
    def context_tokens(self) -> int:
        """The longest sequence the model accepts, in tokens."""
        return context_tokens(self.model)


@dataclass(frozen=True)
class _Place:
    """Where to read from (a folder, a .gguf file or a Hub id), and how to tell a person."""

    model: str
    tokenizer: str
    source: str


def check_model(spec: ModelSpec) -> None:
    """Refuse, before anything large is read, a model that is not there or of no known family.

    Raises what `load_model` raises for those, and for a device that this machine has not.
    """
    resolve_device(spec.device)
    place = _find(spec)
    if place.model.endswith(".gguf"):
        read_gguf_table(Path(place.model))
    else:
        _load_config(place.model, spec.revision)


def load_model(spec: ModelSpec, *, dtype: str | None = None) -> LoadedModel:
    """Load what `spec` names, in eval mode, with frozen weights and no decoding habits of its own.

    `dtype` replaces `spec.dtype` where a caller needs a certain precision.
    Raises UserError (not found, not safetensors, no room) and UnknownFamilyError.
    """
    from transformers import GenerationConfig

    settle_process(spec)
    device = resolve_device(spec.device)
    torch_dtype = resolve_dtype(dtype or spec.dtype, device)
    place = _find(spec)
    if place.model.endswith(".gguf"):
        from swlora.models.gguf_frozen import load_gguf_model

        path = Path(place.model)
        model, tokenizer, how = load_gguf_model(path, spec.frozen, torch_dtype, device)
        place = replace(place, source=f"{place.source}{how}")
    else:
        model, tokenizer = _load_pretrained(place.model, spec.revision, torch_dtype), None
    tokenizer = _checked_tokenizer(model, tokenizer, place, spec)
    model.requires_grad_(False)
    check_finite(model, place.source)
    ends = find_end_tokens(model, tokenizer, model.generation_config)
    model.generation_config = GenerationConfig()  # DecodeSpec alone says how text is generated
    revision = commit_of(place.model, spec.revision)
    model = moved(model, place.model, device).eval()
    return LoadedModel(model, tokenizer, place.model, revision, place.source, ends)


def settle_process(spec: ModelSpec) -> None:
    """Set allocator, kernels, threads and limits of this process as `spec` says."""
    keep_freed_memory()
    keep_few_kernels()
    settle_threads(spec.threads)
    limit_memory(spec.memory_gb)


def load_skeleton(spec: ModelSpec) -> LoadedModel:
    """Load what `spec` names without its weights: the same modules on the meta device, which have
    shapes and no content, and the tokenizer.

    Raises what `load_model` raises, as far as weights are not concerned.
    """
    place, tokenizer = _find(spec), None
    if place.model.endswith(".gguf"):
        from swlora.models.gguf_file import read_gguf_header

        config, tokenizer = read_gguf_header(Path(place.model))
        family_of(config.model_type)
    else:
        config = _load_config(place.model, spec.revision)
    model = make_skeleton(config, place.model)
    tokenizer = _checked_tokenizer(model, tokenizer, place, spec)
    decoding = model.generation_config
    if not place.model.endswith(".gguf"):
        decoding = _load_generation_config(place.model, spec.revision)
    ends = find_end_tokens(model, tokenizer, decoding)
    revision = commit_of(place.model, spec.revision)
    return LoadedModel(model, tokenizer, place.model, revision, place.source, ends)


def settled_model(spec: ModelSpec) -> ModelSpec:
    """Return `spec` with the name of what is loaded: `builtin`, where no model was named and the
    default is neither cached nor to be had from the Hub; else the name that it has.
    """
    chosen = "name" in spec.model_fields_set or spec.tokenizer or spec.revision
    if chosen or cached_file(spec.name, "config.json") or hub_reachable():
        return spec
    return spec.model_copy(update={"name": BUILTIN_MODEL})


def _find(spec: ModelSpec) -> _Place:
    path = expanded(spec.name)
    if spec.frozen is not None and not spec.name.endswith(".gguf"):
        raise UserError(f"--frozen is about .gguf files, and {spec.name} is none; leave it out")
    if (settled := settled_model(spec)) != spec:
        reason = f"{spec.name} is not cached and the Hugging Face Hub cannot be reached"
        place = _find(settled)
        return replace(place, source=f"{place.source}, because {reason}")
    if spec.name == BUILTIN_MODEL:
        name, source = _builtin(), "SmolLM2-135M-Instruct, the embedded model"
    elif spec.name.endswith(".gguf"):
        if not (may_be_path(path) and path.is_file()):
            raise UserError(f"there is no file {spec.name}")
        name, source = str(path), f"the GGUF file {path}"
    elif may_be_path(path) and path.is_dir():
        name, source = str(path), f"the folder {path}"
    else:
        return _find_on_hub(spec)
    if spec.revision is not None:
        raise UserError(
            f"--revision is a version on the Hub, but {spec.name} is local; leave it out"
        )
    tokenizer = name if spec.tokenizer is None else _find_tokenizer(spec.tokenizer)
    return _Place(name, tokenizer, source)


def _find_on_hub(spec: ModelSpec) -> _Place:
    if spec.name.startswith(("/", ".", "~")) or spec.name.count("/") > 1:
        raise UserError(f"there is no model folder {spec.name}")
    if cached_file(spec.name, "config.json", spec.revision) or hub_reachable():
        same = spec.tokenizer in (None, spec.name)
        tokenizer = spec.name if same else _find_tokenizer(str(spec.tokenizer))
        return _Place(spec.name, tokenizer, f"{spec.name} from the Hugging Face Hub")
    raise UserError(
        f"{spec.name} is not a folder, is not cached, and the Hugging Face Hub cannot be reached; "
        "give --model a local folder, a .gguf file or 'builtin'"
    )


def _find_tokenizer(name: str) -> str:
    path = expanded(name)
    if may_be_path(path) and path.is_dir():
        return str(path)
    if cached_file(name, "tokenizer.json") or hub_reachable():
        return name
    raise UserError(
        f"the tokenizer {name} is not a folder, is not cached, and the Hugging Face Hub cannot be "
        "reached; give --tokenizer a local folder"
    )


def _builtin() -> str:
    from swlora.models.builtin import builtin_folder

    return str(builtin_folder())


def _load_config(name: str, revision: str | None) -> Any:
    from transformers import AutoConfig

    if Path(name).is_dir():
        check_model_folder(Path(name), weights=False)
    where = {"revision": revision, "local_files_only": _is_offline(name)}
    try:
        with quiet_libraries():
            config = AutoConfig.from_pretrained(name, trust_remote_code=False, **where)
    except Exception as error:  # loaders raise the errors of many libraries
        raise UserError(f"the model {name} cannot be loaded: {_brief(error)}") from error
    if not Path(name).is_dir() and (cached := cached_file(name, "config.json", revision)):
        check_counts(Path(cached))
    family_of(config.model_type)
    return config


def _load_generation_config(name: str, revision: str | None) -> Any:
    """Return what generation_config.json says; None where there is no such file.

    Raises UserError where it is no configuration.
    """
    from transformers import GenerationConfig

    where = {"revision": revision, "local_files_only": _is_offline(name)}
    try:
        return GenerationConfig.from_pretrained(name, **where)
    except OSError:  # as transformers does when it loads the model
        return None
    except Exception as error:  # of whatever kind a value in it ends in
        what = f"generation_config.json of {name} cannot be read"
        raise UserError(f"{what}: {_brief(error)}") from error


def _load_pretrained(name: str, revision: str | None, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM

    config = _load_config(name, revision)
    if Path(name).is_dir():
        check_model_folder(Path(name))
        n_numbers = check_declared_size(Path(name))
        check_weights_fit(name, n_numbers, dtype, bytes_if_quantised(Path(name), config))
    try:
        with quiet_libraries():
            model, report = AutoModelForCausalLM.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                revision=revision,
                local_files_only=_is_offline(name),
            )
    except Exception as error:  # loaders raise the errors of many libraries
        raise UserError(f"the model {name} cannot be loaded: {_brief(error)}") from error
    if missing := sorted(report["missing_keys"]):  # transformers would fill them at random
        raise UserError(
            f"the model {name} lacks {counted(len(missing), 'weight')}, such as {missing[0]}"
        )
    return model


def _load_tokenizer(name: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    if Path(name).is_dir():
        check_tokenizer_folder(Path(name))
    elif cached := cached_file(name, TOKENIZER, revision):
        check_added_tokens(Path(cached).parent)
    where = {"revision": revision, "local_files_only": _is_offline(name)}
    what = f"the tokenizer of {name} cannot be loaded"
    try:
        with quiet_libraries(), panic_named(what):
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **where)
    except UserError:
        raise
    except Exception as error:  # loaders raise the errors of many libraries
        raise UserError(f"{what}: {_brief(error)}") from error


def _checked_tokenizer(model: Any, of_file: Any, place: _Place, spec: ModelSpec) -> Any:
    """Return the tokenizer of a GGUF file (None for others) or of the place that is named."""
    own, tokenizer = place.tokenizer == place.model, of_file
    if tokenizer is None or not own:
        tokenizer = _load_tokenizer(place.tokenizer, spec.revision if own else None)
    _check_tokenizer(model, tokenizer, place.tokenizer)
    return tokenizer


def _check_tokenizer(model: Any, tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer that cannot serve the model; take a missing EOS from the model."""
    n_known = n_embeddings(model)
    added = tokenizer.get_added_vocab()
    beyond = {t for t, token_id in tokenizer.get_vocab().items() if token_id >= n_known}
    needed = {tokenizer.bos_token, tokenizer.eos_token} & beyond
    # Gemma 3's tokenizer has a token for images, added for siblings of its text models.
    if needed or not beyond <= added.keys():
        raise UserError(
            f"the tokenizer knows {counted(len(tokenizer), 'token')} but the model embeds "
            f"{n_known:,}; they do not belong together (see --tokenizer)"
        )
    sample = set(tokenizer("word", add_special_tokens=False).input_ids)
    if sample <= {tokenizer.unk_token_id}:  # made up by transformers where the files are missing
        raise UserError(f"{name} holds no tokenizer with a vocabulary; give one with --tokenizer")
    if tokenizer.eos_token_id is None:
        eos = getattr(model.config, "eos_token_id", None)
        if not isinstance(eos, int) or eos >= min(n_known, len(tokenizer)):
            raise UserError(
                "neither tokenizer nor model names the end-of-sequence token: name one as "
                "eos_token in its tokenizer_config.json, in a copy of the model's folder"
            )
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= n_known:
        tokenizer.pad_token = tokenizer.eos_token


def _is_offline(name: str) -> bool:
    """Say that `name` is read without the network: it is local, or the Hub is out of reach."""
    return Path(name).exists() or not hub_reachable()


def commit_of(name: str, revision: str | None) -> str | None:
    """Return the commit of a Hub model, which names its folder in the cache; None for others."""
    if Path(name).exists():
        return None
    path = cached_file(name, "config.json", revision)
    return Path(path).parent.name if path else revision


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
