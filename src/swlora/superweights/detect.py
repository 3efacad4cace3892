"""Candidates for super weights: one forward pass, the largest input and output of every projection.

For an output projection y = W x, a super weight W[j, k] shows as a spike in both y_j and x_k at
one token, since y_j ~ W[j, k] x_k there (arXiv 2411.07191, section 3.1). A spike is a candidate,
not a proof: late spikes that cancel earlier ones look the same. `ablate.py` decides.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swlora.errors import UserError
from swlora.models.anatomy import Anatomy, WeightAddress, context_tokens, weight_out_in


@dataclass(frozen=True)
class Spike:
    """The entry of largest magnitude of one activation, for one prompt."""

    value: float
    token: int
    channel: int


@dataclass(frozen=True)
class ModuleScan:
    """Largest input and output activation of one projection."""

    layer: int
    module: str
    input: Spike
    output: Spike


@dataclass(frozen=True)
class Candidate:
    """A weight at the crossing of an output spike and the input that feeds it most.

    `contribution_share` is |x_k W[j, k]| / |y_j| at the spike's token.
    """

    address: WeightAddress
    weight: float
    input_value: float
    output_value: float
    token: int
    contribution_share: float


@dataclass(frozen=True)
class Scan:
    """One forward pass over one prompt: every projection's spikes, and the candidates."""

    prompt: str
    tokens: list[str]
    modules: list[ModuleScan]
    candidates: list[Candidate]


def scan(model: Any, tokenizer: Any, prompt: str, *, max_candidates: int) -> Scan:
    """Run `prompt` once and return all spikes and the `max_candidates` largest contributions.

    Only output projections (attention out, MLP out) are candidates: their outputs enter the
    residual stream. Raises UserError where the prompt has no tokens, or too many.
    """
    anatomy = Anatomy(model)
    token_ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    if token_ids.shape[1] == 0:
        raise UserError("the prompt has no tokens; give --prompt some text")
    if token_ids.shape[1] > context_tokens(model):
        raise UserError(f"the prompt has more tokens than the model's {context_tokens(model)}")
    modules: list[ModuleScan] = []
    candidates: list[Candidate] = []

    def observe(layer: int, name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        modules.append(ModuleScan(layer, name, _spike(x), _spike(y)))
        if name in (anatomy.family.attention_out, anatomy.family.mlp_out):
            candidates.append(_candidate(layer, name, module, x, y))

    with torch.inference_mode(), observed(anatomy, observe):
        model(input_ids=token_ids, use_cache=False)
    candidates.sort(key=lambda c: -abs(c.weight * c.input_value))
    tokens = tokenizer.convert_ids_to_tokens(token_ids[0].tolist())
    return Scan(prompt, tokens, modules, candidates[:max_candidates])


@contextmanager
def observed(
    anatomy: Anatomy, observe: Callable[[int, str, nn.Module, Tensor, Tensor], None]
) -> Iterator[None]:
    """Call `observe(layer, name, module, x, y)` for every projection while the body runs.

    x is (T, in), y is (T, out), float32, of the first sequence. Hooks are removed at the end,
    also when the body raises.
    """
    handles = []
    try:
        for p in anatomy.all_projections():

            def hook(
                module: nn.Module,
                inputs: tuple[Tensor, ...],
                output: Tensor,
                layer: int = p.layer,
                name: str = p.name,
            ) -> None:
                x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
                y = output.detach().reshape(-1, output.shape[-1]).float()
                observe(layer, name, module, x, y)

            handles.append(p.module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _spike(x: Tensor) -> Spike:
    token, channel = divmod(int(x.abs().argmax()), x.shape[1])
    return Spike(float(x[token, channel]), token, channel)


def _candidate(layer: int, name: str, module: nn.Module, x: Tensor, y: Tensor) -> Candidate:
    spike = _spike(y)
    weight = weight_out_in(module)[spike.channel].float()  # (in,)
    contributions = weight * x[spike.token]
    in_channel = int(contributions.abs().argmax())
    return Candidate(
        address=WeightAddress(layer, name, spike.channel, in_channel),
        weight=float(weight[in_channel]),
        input_value=float(x[spike.token, in_channel]),
        output_value=spike.value,
        token=spike.token,
        contribution_share=abs(float(contributions[in_channel]) / (spike.value or 1.0)),
    )
