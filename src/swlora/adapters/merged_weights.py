"""The weights of a model with an adapter added to them, computed one tensor at a time in float32.

    LoRA         W + s B A          s = alpha / r; with rsLoRA alpha / sqrt(r)
    AdaLoRA      W + s B diag(e) A  s = alpha / (r0 + 1e-5), r0 the rank that it began with
    DoRA         m (W + s B A) / |W + s B A|, the norm over the inputs of each output
    Super-Tuning W, and numbers added to some of its entries
    PiSSA        W less its principal part of rank r, + s B A: as PEFT's own training saves it
    whole modules, biases, rows of tokens: the adapter's in the place of the model's

A (r, in), B (out, r) and W (out, in) are float32, whatever the files hold. GPT-2's Conv1D and
embeddings hold W as (in, out).
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from swlora.adapters.mergeable import EXACT_START, merge_refusal
from swlora.adapters.patterns import check_patterns, matching_keys
from swlora.adapters.saved import CONFIG, WEIGHTS, read_config
from swlora.errors import UserError

Change = Callable[[Tensor], Tensor]  # of a weight in float32, which it may write to
_PREFIX = "base_model.model."
_TOKENS = "token_adapter.trainable_tokens_delta"
_PARTS = re.compile(
    r"(?P<module>.+)\.(?P<part>(supertuning_)?lora_[AB]|lora_(E|embedding_A|embedding_B)"
    rf"|lora_magnitude_vector|supertuning_(values|indices)|{re.escape(_TOKENS)}"
    r")(?P<ending>\.weight|\.bias)?"
)
_RANK_EPSILON = 1e-5  # of PEFT's AdaLoRA


class MergedWeights:
    """What an adapter changes in a model, and each changed weight.

    `model` is the model without adapter: its modules say how weights are laid out, their numbers
    are not read. Raises UserError where anything in the adapter has no place in the model, or
    cannot be added to its weights.
    """

    def __init__(self, folder: Path, model: Any) -> None:
        self._folder, self._model = folder, model
        self._config = read_config(folder)
        if reason := merge_refusal(self._config):
            raise self._refused(reason)
        try:
            check_patterns(self._config)
        except UserError as error:
            raise self._refused(str(error)) from None
        self.notes: list[str] = []
        self.own: dict[str, str] = {}  # keys of what is the model's own, by the name of the weight
        self.tokens: set[str] = set()  # names of weights in which rows of some tokens are replaced
        self._changes: defaultdict[str, list[Change]] = defaultdict(list)
        parts: defaultdict[str, dict[str, str]] = defaultdict(dict)  # keys by module and part
        self._file = _open_tensors(folder)
        for key in self._file.keys():  # noqa: SIM118 - it has no __iter__
            path = key.removeprefix(_PREFIX)
            if path == key:
                raise self._refused(f"{key[:100]} is no name that PEFT gives")
            if found := _PARTS.fullmatch(path):
                is_bias = found["ending"] == ".bias"
                parts[found["module"]][found["part"] + (".bias" if is_bias else "")] = key
            else:
                self._take_whole(path.replace(".base_layer.", "."), key)
        for module_name, of_module in parts.items():
            self._take_parts(module_name, {part: self._read(k) for part, k in of_module.items()})
        if not self._changes:
            raise self._refused("it changes no weight")

    @property
    def changed(self) -> list[str]:
        """The names, in the model's state dict, of the weights that the adapter changes."""
        return list(self._changes)

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """Return a changed weight in float32, laid out as `weight`, the model's, which is kept.

        Raises UserError where it is not finite.
        """
        value = weight.to(torch.float32, copy=True)
        for change in self._changes[name]:
            value = change(value)
        if not bool(torch.isfinite(value).all()):
            raise self._refused(f"with it {name} holds numbers that are not finite")
        return value

    def check_own(self, weight_of: Callable[[str], Tensor]) -> None:
        """Raise UserError where the adapter brings another number for what it does not train.

        PEFT saves embeddings and head beside an adapter of them. weight_of: the model's own weight.
        """
        for name, key in self.own.items():
            own, brought = weight_of(name), self._file.get_tensor(key)
            if not torch.equal(brought.to(own.dtype), own):
                raise self._refused(
                    f"it brings other numbers for {name}, which it does not train: it belongs to "
                    "another model"
                )

    def _take_whole(self, name: str, key: str) -> None:
        """Take a weight or bias of the model that the adapter brings."""
        try:
            own = self._model.get_parameter(name)
        except AttributeError:
            raise self._refused(f"the model has no {name[:100]}") from None
        shape = tuple(self._file.get_slice(key).get_shape())
        self._check_shape(name, shape, tuple(own.shape))
        saved = self._config.get("modules_to_save") or []
        modules = [name[: dot.start()] for dot in re.finditer(r"\.", name)]
        is_trained = any(module.endswith(tuple(saved)) for module in modules)
        is_trained |= name.endswith("bias") and self._config.get("bias", "none") != "none"
        if is_trained:
            self._changes[name].append(lambda _: self._read(key))
        else:
            self.own[name] = key

    def _take_parts(self, name: str, parts: dict[str, Tensor]) -> None:
        """Take what an adapter has for one module."""
        try:
            module = self._model.get_submodule(name)
        except AttributeError:
            raise self._refused(f"the model has no module {name[:100]}") from None
        if not isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            raise self._refused(f"{name} is of the type {type(module).__name__}")
        kinds: dict[frozenset[str], Callable[..., Change]] = {
            frozenset({"lora_A", "lora_B"}): self._lora,
            frozenset({"lora_embedding_A", "lora_embedding_B"}): self._lora,
            frozenset({"lora_A", "lora_B", "lora_E"}): self._adalora,
            frozenset({"supertuning_values", "supertuning_indices"}): self._sparse,
            frozenset({_TOKENS}): self._tokens,
        }
        bias = parts.pop("lora_B.bias", None)
        magnitude = parts.pop("lora_magnitude_vector", None)
        sides = [f"supertuning_lora_{side}" for side in "AB"]
        low_rank = [parts.pop(side) for side in sides if side in parts]
        make = kinds.get(frozenset(parts))
        if make is None or (magnitude is not None) != bool(self._config.get("use_dora")):
            raise self._refused(f"for {name} it holds {', '.join(sorted(parts))} alone")
        is_turned = not isinstance(module, nn.Linear)
        changes = self._changes[f"{name}.weight"]
        if self._config.get("init_lora_weights") == EXACT_START and make == self._lora:
            changes.append(partial(_less_principal_part, rank=len(parts["lora_A"])))
        changes.append(make(name, module, *(parts[part] for part in sorted(parts))))
        if len(low_rank) == 2:
            changes.append(self._lora(name, module, *low_rank))
        if magnitude is not None:
            self._check_shape(name, tuple(magnitude.shape), (_sides(module)[0],))
            changes.append(partial(_with_norms, norms=magnitude, is_turned=is_turned))
        if bias is not None:
            self._add_bias(name, module, bias)

    def _lora(self, name: str, module: Any, a: Tensor, b: Tensor) -> Change:
        rank, alpha = self._rank_and_alpha(name)
        self._check_pair(name, module, a, b)
        if len(a) != rank:
            raise self._refused(f"{name} has rank {len(a)} and not {rank}, as {CONFIG} says")
        scale = alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
        return partial(_add_product, a=a, b=b, scale=scale, is_turned=not _is_linear(module))

    def _adalora(self, name: str, module: Any, a: Tensor, b: Tensor, e: Tensor) -> Change:
        self._check_pair(name, module, a, b)
        self._check_shape(name, tuple(e.shape), (len(a), 1))
        first_rank, alpha = int(self._config["init_r"]), float(self._config["lora_alpha"])
        scale = (alpha if alpha > 0 else first_rank) / (first_rank + _RANK_EPSILON)
        return partial(_add_product, a=a * e, b=b, scale=scale, is_turned=not _is_linear(module))

    def _sparse(self, name: str, module: Any, indices: Tensor, values: Tensor) -> Change:
        places, n_weights = indices.long(), module.weight.numel()
        if places.shape != values.shape or not bool(((places >= 0) & (places < n_weights)).all()):
            raise self._refused(f"{name} has other entries than the adapter's")
        return lambda weight: weight.reshape(-1).scatter_add(0, places, values).view_as(weight)

    def _tokens(self, name: str, module: Any, rows: Tensor) -> Change:
        chosen = self._config.get("trainable_token_indices")
        if isinstance(chosen, dict):
            key = next((key for key in chosen if f".{name}".endswith(f".{key}")), None)
            chosen = chosen[key] if key else None
        token_ids = torch.tensor(chosen or [], dtype=torch.long)
        self._check_shape(name, tuple(rows.shape), (len(token_ids), module.weight.shape[1]))
        if not bool(((token_ids >= 0) & (token_ids < module.weight.shape[0])).all()):
            raise self._refused(f"it trains tokens that {name} has not")
        self.tokens.add(f"{name}.weight")
        return lambda weight: weight.index_copy(0, token_ids, rows)

    def _add_bias(self, name: str, module: Any, bias: Tensor) -> None:
        if getattr(module, "bias", None) is None:
            raise self._refused(f"it gives {name} a bias, and the model has none there")
        self._check_shape(name, tuple(bias.shape), tuple(module.bias.shape))
        rank, alpha = self._rank_and_alpha(name)
        scale = alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
        self._changes[f"{name}.bias"].append(lambda own: own + scale * bias)

    def _rank_and_alpha(self, name: str) -> tuple[int, float]:
        """Return both for a module as PEFT's loader takes them: the first pattern that matches."""
        found: list[float] = []
        for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            values: Mapping[str, Any] = self._config.get(pattern) or {}
            matching = matching_keys(values, name)
            if len({values[key] for key in matching}) > 1:
                self.notes.append(
                    f"several keys of {pattern} match {name}: {', '.join(matching)}; the first "
                    "counts, as where PEFT loads the adapter, and its training may have had another"
                )
            found.append(values[matching[0]] if matching else self._config[default])
        rank, alpha = found
        if not isinstance(rank, int) or rank < 1 or not math.isfinite(alpha):
            raise self._refused(f"{CONFIG} gives {name} no rank and scale")
        return rank, float(alpha)

    def _check_pair(self, name: str, module: Any, a: Tensor, b: Tensor) -> None:
        n_out, n_in = _sides(module)
        self._check_shape(name, (*b.shape, *a.shape), (n_out, len(a), len(a), n_in))

    def _check_shape(self, name: str, found: tuple[int, ...], needed: tuple[int, ...]) -> None:
        if found != needed:
            raise self._refused(
                f"{name} has other shapes ({list(found)} where this model needs {list(needed)}): "
                "it belongs to another model"
            )

    def _read(self, key: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(key)
        return tensor if "indices" in key else tensor.to(torch.float32)

    def _refused(self, reason: str) -> UserError:
        return UserError(f"the adapter in {self._folder} cannot be merged: {reason}")


def _open_tensors(folder: Path) -> Any:
    from safetensors import safe_open

    try:
        return safe_open(folder / WEIGHTS, "pt")
    except Exception as error:  # of safetensors and the system
        raise UserError(f"{folder / WEIGHTS} cannot be read: {error}") from error


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _sides(module: Any) -> tuple[int, int]:
    """Return (out, in) of a module's weight."""
    rows, columns = module.weight.shape
    return (rows, columns) if _is_linear(module) else (columns, rows)


def _add_product(weight: Tensor, a: Tensor, b: Tensor, scale: float, is_turned: bool) -> Tensor:
    left, right = (a.t(), b.t()) if is_turned else (b, a)
    return weight.addmm_(left, right, alpha=scale)


def _with_norms(weight: Tensor, norms: Tensor, is_turned: bool) -> Tensor:
    along = 0 if is_turned else 1
    now = torch.linalg.vector_norm(weight, dim=along, keepdim=True)
    return weight.mul_(norms.unsqueeze(along) / now)


def _less_principal_part(weight: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return weight.sub_((left[:, :rank] * values[:rank]) @ right[:rank])
