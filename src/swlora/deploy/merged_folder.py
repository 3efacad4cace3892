"""A merged model on disk: shards written one at a time, and what else a model folder holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swlora.adapters.merged_weights import MergedWeights
from swlora.adapters.saved import save_tokenizer
from swlora.deploy.merge_base import MergeBase, base_config, base_generation_config
from swlora.errors import UserError
from swlora.files import write_json
from swlora.memory import release_pages
from swlora.models.weight_source import INDEX, SINGLE, SafetensorsWeights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class MergePlan:
    """Which weights are written, their names in the state dict by shard, and what lies beside them.

    `untied` says that head and embedding, tied in the base, are two weights now. `config` and
    `generation` are the base's config.json and generation_config.json.
    """

    shards: list[list[str]]
    untied: bool
    n_bytes: int
    config: dict[str, Any]
    generation: dict[str, Any]


def plan_merge(
    base: MergeBase, merging: MergedWeights, dtype: torch.dtype | None, shard_bytes: int
) -> MergePlan:
    """Divide the weights among files of at most `shard_bytes`, a single larger one apart.

    All that is read of the base but its weights is read here: what is damaged ends a merge before
    gigabytes are written. Raises UserError for that.
    """
    config, generation = base_config(base), base_generation_config(base)
    names, untied = _names(base, merging)
    shards: list[list[str]] = [[]]
    filled = total = 0
    for name in names:
        own = base.tensor(name)
        n_bytes = own.numel() * _dtype_of(own, dtype).itemsize
        if filled and filled + n_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled, total = filled + n_bytes, total + n_bytes
    return MergePlan(shards, untied, total, config, generation)


def _names(base: MergeBase, merging: MergedWeights) -> tuple[list[str], bool]:
    """Return the weights to write, in the order of the base's files, and whether a head is untied.

    A tied head that a file holds beside its embedding is left out, as transformers does.
    """
    tied: dict[str, str] = base.loaded.model.all_tied_weights_keys
    names = [name for shard in base.weights.shards() for name in shard if name not in tied]
    for head, embedding in tied.items():
        changed = {name for name in (head, embedding) if name in merging.changed}
        if changed and not (changed == {embedding} and embedding in merging.tokens):
            names.append(head)
    if unknown := sorted(set(merging.changed).difference(names)):
        raise UserError(f"{base.path} holds no {unknown[0]}, which the adapter changes")
    return names, any(name in tied for name in names)


def write_weights(
    folder: Path,
    plan: MergePlan,
    base: MergeBase,
    merging: MergedWeights,
    dtype: torch.dtype | None,
    advance: Callable[[], None],
) -> None:
    """Write the shards, and their index where there are several; OSError on a full disk.

    No more than one shard is in memory. Every changed weight is rounded once, from float32.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    n_shards, weight_map = len(plan.shards), {}
    for number, names in enumerate(plan.shards, start=1):
        single = f"model-{number:05}-of-{n_shards:05}.safetensors"
        file_name = SINGLE if n_shards == 1 else single
        tensors: dict[str, Tensor] = {}
        for name in names:
            stored = _stored_name(base, name)
            weight_map[stored] = file_name
            tensors[stored] = _written(name, base.tensor(name), merging, dtype)
            advance()
        try:
            save_file(tensors, folder / file_name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        (folder / file_name).chmod(0o644)
        release_pages(tensors.values())
    if n_shards > 1:
        index = {"metadata": {"total_size": plan.n_bytes}, "weight_map": weight_map}
        write_json(folder / INDEX, index)


def _written(name: str, own: Tensor, merging: MergedWeights, dtype: torch.dtype | None) -> Tensor:
    """Return a weight as it is written; an unchanged one in its own dtype is a view of its file."""
    target = _dtype_of(own, dtype)
    is_changed = name in merging.changed
    whole = merging.merged(name, own) if is_changed else own
    weight = whole.to(target)
    if weight.data_ptr() != own.data_ptr():
        release_pages([own])
    is_rounded = target == torch.float16 and (is_changed or own.dtype != target)
    if is_rounded and not bool(torch.isfinite(weight).all()):
        raise UserError(f"{name} holds numbers too large for float16; take --dtype bfloat16")
    return weight.contiguous()


def _dtype_of(own: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and own.is_floating_point() else own.dtype


def changed_dtypes(
    base: MergeBase, merging: MergedWeights, dtype: torch.dtype | None
) -> set[torch.dtype]:
    """Return the dtypes in which the weights that the adapter changes are written."""
    return {_dtype_of(base.tensor(name), dtype) for name in merging.changed}


def _stored_name(base: MergeBase, name: str) -> str:
    weights = base.weights
    if isinstance(weights, SafetensorsWeights) and name in weights.names:
        return weights.stored_name(name)
    return name


def write_rest(
    folder: Path,
    plan: MergePlan,
    tokenizer: Any,
    dtype: torch.dtype,
    end_token_ids: Sequence[int],
) -> None:
    """Write configuration, generation configuration, tokenizer and chat template."""
    config = {name: value for name, value in plan.config.items() if name != "torch_dtype"}
    config["dtype"] = str(dtype).removeprefix("torch.")
    if plan.untied:
        config["tie_word_embeddings"] = False
    write_json(folder / "config.json", config)
    ends = end_token_ids[0] if len(end_token_ids) == 1 else list(end_token_ids)
    write_json(folder / "generation_config.json", plan.generation | {"eos_token_id": ends})
    save_tokenizer(tokenizer, folder)
