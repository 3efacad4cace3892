"""What the parts of a causal language model are called, family by family.

One table is the only place that knows names. A weight of a projection is always addressed as
(layer, module, out_channel, in_channel): y[out] += W[out, in] * x[in]. nn.Linear stores
W[out, in]; GPT-2's Conv1D stores its transpose, [in, out]; only this file maps between the two.

Mixtures of experts hold a block's experts in two 3-D parameters, [expert, out, in]. A slice is
addressed like a projection: `mlp.experts.3.down_proj`. Slices are no modules of the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from swlora.errors import UnknownFamilyError, UserError

EXPERT_IN, EXPERT_OUT = "gate_up_proj", "down_proj"

# Classes that compute w x / rms(x), and down(silu(gate(x)) up(x)) where their activation is SiLU
RMS_NORMS = frozenset(
    f"{family}RMSNorm" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "SmolLM3")
)
SWIGLU_MLPS = frozenset(
    f"{family}MLP" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Olmo2")
)
# Classes of blocks that compute h += attention(norm(h)), h += mlp(norm(h)), with rotary positions
PRE_NORM_BLOCKS = frozenset(
    f"{family}DecoderLayer" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3")
)


@dataclass(frozen=True)
class Family:
    """Names within one family; projection names are relative to a block.

    `experts` is the module that holds the experts of a block, in families that have any; some of
    their blocks may have a plain MLP instead. `has_attention_interface` says whether transformers
    lets another attention function in, `blocks_return_tuples` what a block's forward returns (its
    annotation does not: Gemma 3's is wrong, Falcon has none).
    """

    model_types: tuple[str, ...]
    backbone: str
    blocks: str
    final_norm: str
    attention_in: tuple[str, ...]
    attention_out: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    has_attention_interface: bool = True
    blocks_return_tuples: bool = False
    experts: str | None = None

    @property
    def projections(self) -> tuple[str, ...]:
        """The projections that are modules in every block, in the order of the forward pass.

        With experts these are the attention's alone: an adapter cannot sit on a slice.
        """
        attention = (*self.attention_in, self.attention_out)
        return attention if self.experts else (*attention, *self.mlp_in, self.mlp_out)

    def feeds_residual(self, name: str) -> bool:
        """Say whether a projection's output goes to the residual stream (attention or MLP out)."""
        if name in (self.attention_out, self.mlp_out):
            return True
        return self.experts is not None and name.endswith(f".{EXPERT_OUT}")


def _llama_shape(*model_types: str) -> Family:
    return Family(
        model_types,
        backbone="model",
        blocks="layers",
        final_norm="norm",
        attention_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attention_out="self_attn.o_proj",
        mlp_in=("mlp.gate_proj", "mlp.up_proj"),
        mlp_out="mlp.down_proj",
    )


FAMILIES: tuple[Family, ...] = (
    _llama_shape("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo", "olmo2"),
    _llama_shape("gemma", "gemma2", "gemma3_text"),
    Family(
        ("phi3",),
        backbone="model",
        blocks="layers",
        final_norm="norm",
        attention_in=("self_attn.qkv_proj",),
        attention_out="self_attn.o_proj",
        mlp_in=("mlp.gate_up_proj",),
        mlp_out="mlp.down_proj",
    ),
    Family(
        ("gpt2",),
        backbone="transformer",
        blocks="h",
        final_norm="ln_f",
        attention_in=("attn.c_attn",),
        attention_out="attn.c_proj",
        mlp_in=("mlp.c_fc",),
        mlp_out="mlp.c_proj",
    ),
    Family(
        ("gpt_neox",),
        backbone="gpt_neox",
        blocks="layers",
        final_norm="final_layer_norm",
        attention_in=("attention.query_key_value",),
        attention_out="attention.dense",
        mlp_in=("mlp.dense_h_to_4h",),
        mlp_out="mlp.dense_4h_to_h",
    ),
    Family(
        ("opt",),
        backbone="model.decoder",
        blocks="layers",
        final_norm="final_layer_norm",
        attention_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attention_out="self_attn.out_proj",
        mlp_in=("fc1",),
        mlp_out="fc2",
    ),
    Family(
        ("falcon",),
        backbone="transformer",
        blocks="h",
        final_norm="ln_f",
        attention_in=("self_attention.query_key_value",),
        attention_out="self_attention.dense",
        mlp_in=("mlp.dense_h_to_4h",),
        mlp_out="mlp.dense_4h_to_h",
        has_attention_interface=False,
        blocks_return_tuples=True,
    ),
)
MOE_FAMILIES: tuple[Family, ...] = (
    replace(_llama_shape("mixtral", "qwen3_moe", "olmoe"), experts="mlp.experts"),
)
_BY_TYPE = {t: family for family in (*FAMILIES, *MOE_FAMILIES) for t in family.model_types}


@dataclass(frozen=True)
class Projection:
    """One linear map inside one block."""

    layer: int
    name: str
    full_name: str
    module: nn.Module


@dataclass(frozen=True)
class WeightAddress:
    """One scalar of one projection, addressed by channels and never by storage order."""

    layer: int
    module: str
    out_channel: int
    in_channel: int

    def __str__(self) -> str:
        return f"layer {self.layer} {self.module} [out {self.out_channel}, in {self.in_channel}]"


@dataclass(frozen=True)
class SwigluMaps:
    """The three linear maps of a gated MLP: down(silu(gate(x)) up(x))."""

    gate: nn.Module
    up: nn.Module
    down: nn.Module


class Anatomy:
    """The named parts of one loaded model.

    Raises UnknownFamilyError for an architecture without an entry in the table, or unlike it.
    """

    def __init__(self, model: Any) -> None:
        self.family = family_of(model.config.model_type)
        self.model = model
        try:
            self.backbone: Any = model.get_submodule(self.family.backbone)
            self.blocks: nn.ModuleList = self.backbone.get_submodule(self.family.blocks)
            # None where blocks end in a norm of their own, as those of OPT-350m
            self.final_norm: nn.Module | None = getattr(self.backbone, self.family.final_norm)
        except AttributeError as error:
            raise UnknownFamilyError(
                f"this {model.config.model_type} model is not built like others: {error}"
            ) from error
        self.head: nn.Module = model.get_output_embeddings()

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks."""
        return len(self.blocks)

    @property
    def logit_cap(self) -> float:
        """The soft cap on logits z, cap * tanh(z / cap); 0 for none."""
        return float(getattr(self.model.config, "final_logit_softcapping", None) or 0.0)

    def experts(self, layer: int) -> nn.Module | None:
        """Return the module that holds the experts of block `layer`; None where it has none."""
        named = self.blocks[layer].named_modules()
        return next((module for name, module in named if name == self.family.experts), None)

    def projections(self, layer: int) -> list[Projection]:
        """Return the projections of block `layer` that are modules, in forward order."""
        prefix = f"{self.family.backbone}.{self.family.blocks}.{layer}"
        block = self.blocks[layer]
        return [
            Projection(layer, name, f"{prefix}.{name}", block.get_submodule(name))
            for name in self._module_names(layer)
        ]

    def all_projections(self) -> Iterator[Projection]:
        """Yield the projections of every block, first block first."""
        for layer in range(self.n_layers):
            yield from self.projections(layer)

    def projection(self, layer: int, name: str) -> nn.Module:
        """Return one projection; UserError where layer or name do not exist.

        A slice of the experts comes as an nn.Linear over the same memory: writes to its weight go
        through, but the model never calls it, so hooks on it stay silent.
        """
        if not 0 <= layer < self.n_layers:
            raise UserError(
                f"layer {layer} does not exist; this model has 0 to {self.n_layers - 1}"
            )
        known = list(self._module_names(layer))
        if name in known:
            return self.blocks[layer].get_submodule(name)
        experts, holder = self.experts(layer), self.family.experts
        if experts is not None:
            n_experts = len(experts.get_parameter(EXPERT_OUT))
            for part in (EXPERT_IN, EXPERT_OUT):
                number = name.removeprefix(f"{holder}.").removesuffix(f".{part}")
                if name == f"{holder}.{number}.{part}" and number in map(str, range(n_experts)):
                    return _linear_over(experts.get_parameter(part)[int(number)])
                known.append(f"{holder}.0 to {n_experts - 1}.{part}")
        raise UserError(f"no projection is called {name!r}; this model has {', '.join(known)}")

    def weight_view(self, address: WeightAddress) -> Tensor:
        """Return the addressed scalar as a 0-dim view into the weight (writes go through)."""
        module = self.projection(address.layer, address.module)
        weight = weight_out_in(module)
        n_out, n_in = weight.shape
        if not (0 <= address.out_channel < n_out and 0 <= address.in_channel < n_in):
            raise UserError(f"{address} lies outside the weight of shape [out {n_out}, in {n_in}]")
        return weight[address.out_channel, address.in_channel]

    def _module_names(self, layer: int) -> tuple[str, ...]:
        family = self.family
        if family.experts and self.experts(layer) is None:  # a plain block among those with experts
            return (*family.projections, *family.mlp_in, family.mlp_out)
        return family.projections


def _linear_over(weight: Tensor) -> nn.Linear:
    n_out, n_in = weight.shape
    linear = nn.Linear(n_in, n_out, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear


def weight_out_in(module: nn.Module) -> Tensor:
    """Return a projection's weight as a view of shape (out, in), whatever its storage order."""
    weight = module.get_parameter("weight").detach()
    return weight.t() if isinstance(module, Conv1D) else weight


def bias_out(module: nn.Module) -> Tensor | None:
    """Return a projection's bias of shape (out,); None where it has none."""
    bias = getattr(module, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def rms_norm_epsilon(module: Any) -> float | None:
    """Return the epsilon of an RMSNorm of a known class; None for any other module."""
    return float(module.variance_epsilon) if type(module).__name__ in RMS_NORMS else None


def swiglu_maps(module: Any) -> SwigluMaps | None:
    """Return the maps of a gated MLP of a known class with SiLU; None for any other module."""
    activation = getattr(module, "act_fn", None)
    is_silu = isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"
    if type(module).__name__ not in SWIGLU_MLPS or not is_silu:
        return None
    return SwigluMaps(module.gate_proj, module.up_proj, module.down_proj)


def is_pre_norm_block(module: Any) -> bool:
    """Say whether a block adds attention and then an MLP to h, each of a norm of h."""
    return type(module).__name__ in PRE_NORM_BLOCKS


def attention_window(attention: Any) -> int | None:
    """Return how far the attention of such a block sees back, in tokens; None for everything."""
    holder = attention.config if type(attention).__name__ == "MistralAttention" else attention
    return getattr(holder, "sliding_window", None)


def context_tokens(model: Any) -> int:
    """Return the longest sequence the model accepts, in tokens."""
    return int(getattr(model.config, "max_position_embeddings", 0) or 1_000_000)


def n_embeddings(model: Any) -> int:
    """Return the number of tokens that the model knows, also where an adapter wraps them."""
    return int(model.get_input_embeddings().weight.shape[0])


def family_of(model_type: str) -> Family:
    """Return the family of a `config.model_type`; UnknownFamilyError names the known ones."""
    try:
        return _BY_TYPE[model_type]
    except KeyError:
        known = ", ".join(sorted(_BY_TYPE))
        raise UnknownFamilyError(
            f"models of type {model_type!r} are not supported; supported types: {known}"
        ) from None
