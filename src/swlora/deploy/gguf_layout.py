"""What a model's tensors are called in a GGUF file, and in which order llama.cpp has their rows.

The names are those of the `gguf` package. Orders of rows are said once, as numbers of rows, since
they hold for a weight, for its bias and for the B of a LoRA alike:

    Llama shapes        q and k: the halves of a rotated head lie beside each other, in pairs
    GPT-NeoX, Falcon    the fused projection: all of q, then all of k, then all of v

Checked by outputs, family by family, in llama.cpp itself.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from swlora.errors import UnknownFamilyError, UserError
from swlora.models.anatomy import family_of
from swlora.models.gguf_rope import head_dim

Rows = Callable[[Any], Tensor]  # of a configuration
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class GgufFamily:
    """How llama.cpp knows models of one `config.model_type`.

    `arch` is its name of the architecture. `rows` are the modules whose rows it has in another
    order, by their last name. `adds_one` says that it has norms as 1 + w. `conv1d` are the modules
    that transformers stores as [in, out]. `is_read_back` says that transformers reads such files.
    """

    arch: str
    rows: dict[str, Rows] = field(default_factory=dict)
    adds_one: bool = False
    conv1d: tuple[str, ...] = ()
    is_read_back: bool = True


@dataclass(frozen=True)
class Place:
    """Where a tensor goes: its name in the file, and what is done to it on the way.

    `rows` has for each row of the file the number of the model's row; None where they are the same.
    `expert` is its number in a stack of experts.
    """

    name: str
    rows: Tensor | None
    is_transposed: bool
    adds_one: bool
    expert: int | None = None

    def arranged(self, tensor: Tensor) -> Tensor:
        """Return a weight or bias as the file has it: (out, in) or (out,)."""
        if self.is_transposed and tensor.ndim == 2:
            tensor = tensor.t()
        if self.rows is not None:
            tensor = tensor[self.rows]
        return tensor + 1 if self.adds_one else tensor


def _in_pairs(n_rows: int, n_heads: int) -> Tensor:
    """Return the rows of a head whose first half is rotated with its second, pair by pair."""
    rows = torch.arange(n_rows).view(n_heads, 2, n_rows // n_heads // 2)
    return rows.transpose(1, 2).reshape(-1)


def _queries(config: Any) -> Tensor:
    return _in_pairs(config.num_attention_heads * head_dim(config), config.num_attention_heads)


def _keys(config: Any) -> Tensor:
    n_heads = config.num_key_value_heads
    return _in_pairs(n_heads * head_dim(config), n_heads)


def _neox_rows(config: Any) -> Tensor:
    n_heads = config.num_attention_heads
    rows = torch.arange(3 * config.hidden_size).view(n_heads, 3, head_dim(config))
    return rows.transpose(0, 1).reshape(-1)


def _falcon_rows(config: Any) -> Tensor:
    n_heads, n_kv = config.num_attention_heads, falcon_kv_heads(config)
    n_rows = (n_heads + 2 * n_kv) * head_dim(config)
    rows = torch.arange(n_rows).view(n_kv, n_heads // n_kv + 2, head_dim(config))
    return torch.cat([rows[:, :-2].flatten(), rows[:, -2].flatten(), rows[:, -1].flatten()])


def falcon_kv_heads(config: Any) -> int:
    """Return how many heads of keys and values a Falcon has."""
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


_PAIRS: dict[str, Rows] = {"q_proj": _queries, "k_proj": _keys}
GGUF_FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily("llama", _PAIRS),
    "mistral": GgufFamily("llama", _PAIRS, is_read_back=False),
    "mixtral": GgufFamily("llama", _PAIRS, is_read_back=False),
    "smollm3": GgufFamily("smollm3", _PAIRS, is_read_back=False),
    "olmo": GgufFamily("olmo", _PAIRS, is_read_back=False),
    "olmo2": GgufFamily("olmo2", is_read_back=False),
    "olmoe": GgufFamily("olmoe", is_read_back=False),
    "qwen2": GgufFamily("qwen2"),
    "qwen3": GgufFamily("qwen3"),
    "qwen3_moe": GgufFamily("qwen3moe"),
    "gemma": GgufFamily("gemma", adds_one=True, is_read_back=False),
    "gemma2": GgufFamily("gemma2", adds_one=True),
    "gemma3_text": GgufFamily("gemma3", adds_one=True),
    "phi3": GgufFamily("phi3"),
    "gpt2": GgufFamily("gpt2", conv1d=("c_attn", "c_proj", "c_fc")),
    "gpt_neox": GgufFamily("gptneox", {"query_key_value": _neox_rows}, is_read_back=False),
    "falcon": GgufFamily("falcon", {"query_key_value": _falcon_rows}, is_read_back=False),
}


def gguf_family(model_type: str) -> GgufFamily:
    """Return how llama.cpp knows a `config.model_type`; UnknownFamilyError where it does not."""
    family_of(model_type)
    if model_type not in GGUF_FAMILIES:
        known = ", ".join(sorted(GGUF_FAMILIES))
        raise UnknownFamilyError(
            f"llama.cpp has no models of type {model_type!r}, so there is no GGUF file of one; "
            f"those that can be exported: {known}"
        )
    return GGUF_FAMILIES[model_type]


class GgufLayout:
    """Names and orders of the tensors of one model, by its configuration.

    Raises UnknownFamilyError for a family that llama.cpp does not know.
    """

    def __init__(self, config: Any) -> None:
        import gguf

        self.config = config
        self.family = gguf_family(config.model_type)
        archs = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        self._names = gguf.get_tensor_name_map(archs[self.family.arch], config.num_hidden_layers)
        self._rows = {name: rows(config) for name, rows in self.family.rows.items()}

    def is_left_out(self, name: str) -> bool:
        """Say whether a tensor is none of the file's: a head that is the embedding."""
        is_head = name in ("lm_head.weight", "embed_out.weight")
        return is_head and bool(self.config.tie_word_embeddings)

    def place(self, name: str) -> Place:
        """Return where a tensor of transformers' state dict goes, such as ...q_proj.weight.

        Raises UserError for one that llama.cpp has no place for.
        """
        module, _, kind = name.rpartition(".")
        expert = _EXPERT.search(name)
        base = self._names.get_name(_EXPERT.sub(".experts.", module))
        if base is None or kind not in ("weight", "bias"):
            raise UserError(f"llama.cpp has no place for {name} in a {self.family.arch} model")
        last = module.rpartition(".")[2]
        return Place(
            f"{base}.{kind}",
            self._rows.get(last),
            is_transposed=last in self.family.conv1d,
            adds_one=self.family.adds_one and base.endswith("norm"),
            expert=int(expert[1]) if expert else None,
        )
