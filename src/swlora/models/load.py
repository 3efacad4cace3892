"""A language model and its tokenizer from a Hub id, a local folder, a .gguf file or `builtin`.

Weights come from safetensors (or a GGUF file, read as data) only; code of a model repository is
never run. Where the model was left at its default and the Hub cannot be reached, the embedded
model takes its place and `source` says so.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swlora.config import BUILTIN_MODEL, DEFAULT_MODEL, ModelSpec
from swlora.errors import UserError
from swlora.hub import cached_file, hub_reachable
from swlora.models.anatomy import family_of
from swlora.models.precision import resolve_device, resolve_dtype


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for use, and where it came from (`revision` is a commit or a folder)."""

    model: Any
    tokenizer: Any
    name: str
    revision: str | None
    source: str

    @property
    def context_tokens(self) -> int:
        """The longest sequence the model accepts, in tokens."""
        config = self.model.config
        return int(getattr(config, "max_position_embeddings", 0) or 1_000_000)


def load_model(spec: ModelSpec, *, dtype: str | None = None) -> LoadedModel:
    """Load what `spec` names, in eval mode, with frozen weights.

    `dtype` replaces `spec.dtype` where a caller needs a certain precision.
    Raises UserError (not found, not safetensors) and UnknownFamilyError.
    """
    device = resolve_device(spec.device)
    torch_dtype = resolve_dtype(dtype or spec.dtype, device.type)
    name, source = _resolve(spec)
    if name.endswith(".gguf"):
        from swlora.models.gguf_file import load_gguf

        model, tokenizer = load_gguf(Path(name))
        family_of(model.config.model_type)
        model = model.to(torch_dtype)
    else:
        model, tokenizer = _load_pretrained(name, spec.revision, torch_dtype)
    if spec.tokenizer is not None:
        tokenizer = _load_tokenizer(_resolve_path(spec.tokenizer), None)
    _check_tokenizer(model, tokenizer)
    model.requires_grad_(False)
    revision = getattr(model.config, "_commit_hash", None) or spec.revision
    return LoadedModel(model.to(device).eval(), tokenizer, name, revision, source)


def _resolve(spec: ModelSpec) -> tuple[str, str]:
    if spec.name == BUILTIN_MODEL:
        return _builtin(), "SmolLM2-135M-Instruct, the embedded model"
    if spec.name.endswith(".gguf"):
        if not Path(spec.name).is_file():
            raise UserError(f"there is no file {spec.name}")
        return spec.name, f"the GGUF file {spec.name}"
    path = Path(spec.name).expanduser()
    if path.is_dir():
        return str(path), f"the folder {path}"
    if spec.name.startswith(("/", ".", "~")) or spec.name.count("/") > 1:
        raise UserError(f"there is no model folder {spec.name}")
    if cached_file(spec.name, "config.json", spec.revision) or hub_reachable():
        return spec.name, f"{spec.name} from the Hugging Face Hub"
    if spec.name == DEFAULT_MODEL and spec.revision is None:
        return _builtin(), (
            f"SmolLM2-135M-Instruct, the embedded model, because {DEFAULT_MODEL} "
            "is not cached and the Hugging Face Hub cannot be reached"
        )
    raise UserError(
        f"{spec.name} is not a folder, is not cached, and the Hugging Face Hub cannot be reached; "
        "give --model a local folder, a .gguf file or 'builtin'"
    )


def _builtin() -> str:
    from swlora.models.builtin import builtin_folder

    return str(builtin_folder())


def _resolve_path(name: str) -> str:
    path = Path(name).expanduser()
    return str(path) if path.exists() else name


def _load_pretrained(name: str, revision: str | None, dtype: Any) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        family_of(config.model_type)
        model = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError) as error:
        detail = " ".join(str(error).split())[:300]
        raise UserError(f"the model {name} cannot be loaded: {detail}") from error
    return model, _load_tokenizer(name, revision)


def _load_tokenizer(name: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        detail = " ".join(str(error).split())[:300]
        raise UserError(f"the tokenizer of {name} cannot be loaded: {detail}") from error


def _check_tokenizer(model: Any, tokenizer: Any) -> None:
    n_embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > n_embeddings:
        raise UserError(
            f"the tokenizer knows {len(tokenizer)} tokens but the model embeds {n_embeddings}; "
            "they do not belong together (see --tokenizer)"
        )
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token; swlora trains and stops on it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
