"""The model that an adapter was trained on: found by what the adapter says, and known again."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swlora.adapters.on_base import adapted_spec
from swlora.adapters.saved import read_config, read_facts
from swlora.config import ModelSpec
from swlora.errors import UserError
from swlora.library_noise import quiet_libraries
from swlora.memory import release_pages
from swlora.models.identity import BaseModel, name_base, sample_sha256, weights_sample_sha256
from swlora.models.load import LoadedModel, load_skeleton
from swlora.models.local_files import local_files
from swlora.models.model_folder import CONFIG, read_model_json
from swlora.models.weight_source import WeightSource, open_weights
from swlora.plural import counted


@dataclass(frozen=True)
class MergeBase:
    """A base model by its files: `loaded` has its modules without content, and its tokenizer."""

    loaded: LoadedModel
    path: Path
    weights: WeightSource

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype that a weight is stored in."""
        dtypes = (self.weights.tensor(name).dtype for name in self.weights.names)
        floats = [dtype for dtype in dtypes if dtype.is_floating_point]
        return reduce(torch.promote_types, floats, floats[0])

    def read_whole(self) -> Any:
        """Return the model of transformers: of safetensors as views of the files, in `dtype`."""
        if self.path.suffix == ".gguf":
            from swlora.models.gguf_file import load_gguf

            model, _ = load_gguf(self.path)
            return model.requires_grad_(False).eval()
        return read_folder(self.path, self.dtype)

    def tensor(self, name: str) -> Tensor:
        """Return a weight; a tied head's is that of the embedding."""
        if name in self.weights.names:
            return self.weights.tensor(name)
        tied: dict[str, str] = self.loaded.model.all_tied_weights_keys
        if tied.get(name) in self.weights.names:
            return self.weights.tensor(tied[name])
        raise UserError(f"{self.path} holds no {name}")

    def identify(self) -> BaseModel:
        """Name it, and hash a sample of its weights as a training does."""
        names = sorted(name for name, _ in self.loaded.model.named_parameters())
        if set(names) <= set(self.weights.names):
            sample = sample_sha256(self._one_by_one(names))
        else:  # experts, which transformers puts together
            sample = weights_sample_sha256(self.read_whole())
        return name_base(self.loaded, sample)

    def _one_by_one(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield weights, each given back before the next: a sample touches most of its pages."""
        for name in names:
            weight = self.weights.tensor(name)
            yield name, weight
            release_pages([weight])


def read_folder(folder: Path, dtype: torch.dtype) -> Any:
    """Return the model in a folder, by transformers alone; views of the files where they have
    `dtype`. Raises UserError where weights are missing.
    """
    from transformers import AutoModelForCausalLM

    with quiet_libraries():
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{folder} lacks {counted(len(missing), 'weight')}, such as {missing[0]}")
    return model.requires_grad_(False).eval()


def open_base(adapter: Path, spec: ModelSpec) -> MergeBase:
    """Open the model that `spec` names, or the one that the adapter was trained on.

    The tokenizer is the adapter's own where it brings one. Raises UserError where there is none.
    """
    loaded = load_skeleton(adapted_spec(adapter, spec))
    if getattr(loaded.model.config, "quantization_config", None) is not None:
        raise UserError(
            f"{loaded.source} is quantised: merge into the model that it was made of (--model)"
        )
    path = local_files(loaded)
    return MergeBase(loaded, path, open_weights(path))


def check_base(adapter: Path, base: BaseModel, loaded: LoadedModel) -> str | None:
    """Say in what the adapter was trained on another model than this; None where it was not."""
    facts, config = read_facts(adapter), read_config(adapter)
    trained_on = facts.get("base_weights_sample_sha256")
    if trained_on not in (None, base.weights_sample_sha256):
        return (
            f"{adapter} was trained on {facts.get('base_model')}, read from "
            f"{facts.get('base_read_from')} (sample of its weights: {str(trained_on)[:12]}), and "
            f"{loaded.source} holds other weights ({base.weights_sample_sha256[:12]})"
        )
    revision = config.get("revision")
    if trained_on is None and loaded.revision and revision not in (None, "main", loaded.revision):
        return f"{adapter} was trained on revision {revision}, and this is {loaded.revision}"
    return None


def base_config(base: MergeBase) -> dict[str, Any]:
    """Return the base's config.json as it is; of a GGUF file, what transformers makes of it."""
    if base.path.is_dir():
        config = read_model_json(base.path / CONFIG)
    else:
        config = json.loads(base.loaded.model.config.to_json_string())
        config["architectures"] = [type(base.loaded.model).__name__]
    for name in ("_name_or_path", "auto_map", "quantization_config"):
        config.pop(name, None)
    return config


def base_generation_config(base: MergeBase) -> dict[str, Any]:
    """Return the base's generation_config.json as it is; {} where it has none."""
    path = base.path / "generation_config.json"
    return read_model_json(path) if path.is_file() else {}
