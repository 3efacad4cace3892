"""Candidates for super weights: one forward pass, the spikes of all projections, the residual.

For an output projection y = W x + b, a super weight W[j, k] shows as a spike in both y_j and x_k
at one token, since y_j ~ W[j, k] x_k there (arXiv 2411.07191, section 3.1). What it puts into the
residual stream then stays at channel j: `persistence` tells it from the late spikes that cancel an
earlier one. A candidate is no proof all the same; `ablate.py` decides.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from swlora.data.known_tokens import check_prompts
from swlora.errors import UserError
from swlora.kernels.rotary import RotaryLengths
from swlora.models.anatomy import (
    Anatomy,
    WeightAddress,
    bias_out,
    context_tokens,
    n_embeddings,
    weight_out_in,
)
from swlora.result_json import FLAT
from swlora.superweights.observe import Observation, followed, observed

DOMINANT_SHARE = 0.5  # super activations come in groups, so the largest channel is not the only one


@dataclass(frozen=True)
class Spike:
    """The entry of largest magnitude of one activation, for one prompt."""

    value: float
    token: int
    channel: int


@dataclass(frozen=True)
class ModuleScan:
    """Largest input and output activation of one projection, or of all experts of a block."""

    layer: int
    module: str
    input: Spike
    output: Spike


@dataclass(frozen=True)
class Candidate:
    """A weight at the crossing of an output spike and the input that feeds it most.

    `contribution` is x_k W[j, k] at the spike's token, `contribution_share` its magnitude over
    |y_j|, `bias_share` |b_j| / |y_j| (None without a bias); y_j includes the bias. `persistence`
    is explained at the function of that name.
    """

    address: WeightAddress = field(metadata=FLAT)
    weight: float
    input_value: float
    output_value: float
    token: int
    contribution: float
    contribution_share: float
    bias_share: float | None
    persistence: float


@dataclass(frozen=True)
class Scan:
    """What figures show of a prompt; `residual` is the largest value after every block."""

    prompt: str
    tokens: list[str]
    modules: list[ModuleScan]
    residual: list[Spike]
    candidates: list[Candidate]


@dataclass(frozen=True)
class Trace:
    """One forward pass over one token sequence; candidates by contribution, largest first.

    `stream` is the residual stream, (L + 1, T, D) in float32: before the first block, then after
    each.
    """

    modules: list[ModuleScan]
    candidates: list[Candidate]
    stream: Tensor

    def residual(self) -> list[Spike]:
        """Return the largest value of the residual stream after every block."""
        return [_spike(state, range(len(state))) for state in self.stream[1:]]

    def path(self, token: int, channel: int) -> list[float]:
        """Return the value of the residual stream at one place after every block."""
        return [float(value) for value in self.stream[1:, token, channel]]


def prompt_tokens(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    """Return the tokenizer's ids of a prompt; UserError where there are none, or too many."""
    token_ids: list[int] = tokenizer(prompt, verbose=False).input_ids
    if not token_ids:
        raise UserError("the prompt has no tokens; give --prompt some text")
    check_prompts([token_ids], tokenizer, n_embeddings(model))
    return check_length(model, token_ids)


def leading_bos(tokenizer: Any, token_ids: Sequence[int]) -> list[int]:
    """Return the BOS tokens that token ids begin with, [] where there are none.

    Of ids that a tokenizer made it is what it puts before a text by itself: `add_bos_token` says
    what it would like.
    """
    return list(takewhile(lambda token: token == tokenizer.bos_token_id, token_ids))


def check_length(model: Any, token_ids: list[int]) -> list[int]:
    """Return the token ids; UserError where they are more than the model takes."""
    if len(token_ids) > context_tokens(model):
        raise UserError(f"the prompt has more tokens than the model's {context_tokens(model)}")
    return token_ids


def trace(anatomy: Anatomy, sequences: Sequence[Sequence[int]]) -> list[Trace]:
    """Run token sequences at once and return what each did.

    They are padded at the end, where causal attention hides the padding from their tokens.
    Only output projections (attention out, MLP out) are candidates: their outputs enter the
    residual stream. Raises UserError where an activation is not finite.
    """
    width = max(map(len, sequences))
    padded = [[*ids, *[ids[-1]] * (width - len(ids))] for ids in sequences]
    starts = [i * width for i in range(len(sequences))]
    groups: list[dict[tuple[int, str], ModuleScan]] = [{} for _ in sequences]
    candidates: list[list[Candidate]] = [[] for _ in sequences]

    def observe(o: Observation) -> None:
        for i, (start, ids) in enumerate(zip(starts, sequences, strict=True)):
            first, last = (bisect_left(o.positions, p) for p in (start, start + len(ids)))
            if first == last:  # no token of this sequence was routed to the expert
                continue
            tokens = [position - start for position in o.positions[first:last]]
            x, y = o.x[first:last], o.y[first:last]
            found = ModuleScan(o.layer, o.group, _spike(x, tokens), _spike(y, tokens))
            key = (o.layer, o.group)
            groups[i][key] = _larger(groups[i].get(key, found), found)
            if anatomy.family.feeds_residual(o.name):
                candidates[i].append(_candidate(o, x, y, tokens))

    batch = torch.tensor(padded, device=anatomy.model.device)
    lengths = torch.tensor([[len(ids)] for ids in sequences], device=batch.device)
    rotary = RotaryLengths(anatomy.model).turning(lengths)
    with torch.inference_mode(), observed(anatomy, observe), followed(anatomy) as states, rotary:
        anatomy.backbone(input_ids=batch, use_cache=False)
    streams = [torch.stack([s[i, : len(ids)] for s in states]) for i, ids in enumerate(sequences)]
    if not all(bool(stream.isfinite().all()) for stream in streams):
        raise UserError("the model's activations are not finite; --dtype float32 may help")
    return [
        Trace(list(group.values()), _by_contribution(found, stream), stream)
        for group, found, stream in zip(groups, candidates, streams, strict=True)
    ]


def persistence(stream: Tensor, candidate: Candidate) -> float:
    """Return how far the residual stream (L + 1, T, D) carries on what a candidate puts in.

    It is the share of the blocks after the candidate's own that carry it without a gap. To carry
    is to have, at its token and output channel, a value of the contribution's sign and of at least
    half the magnitude of the token's largest. The own block must do so too, and must have made
    that value larger: otherwise, and in the last block, the persistence is 0.

    So a weight that starts a super activation has about 1; one that takes it away again has 0,
    for its sign is the opposite, or, where it cancels too much, the value shrinks; and one that
    spikes where another channel rules has 0 as well.
    """
    layer, channel = candidate.address.layer, candidate.address.out_channel
    states = stream[:, candidate.token]  # (L + 1, D)
    value = states[:, channel] * (1 if candidate.contribution > 0 else -1)
    carried = (value >= DOMINANT_SHARE * states.abs().amax(dim=1)).tolist()
    made_larger = bool(value[layer + 1] > value[layer].abs())
    later = carried[layer + 2 :]
    if not (later and made_larger and carried[layer + 1]):
        return 0.0
    return [*later, False].index(False) / len(later)


def _by_contribution(candidates: list[Candidate], stream: Tensor) -> list[Candidate]:
    ranked = sorted(candidates, key=lambda c: -abs(c.contribution))
    return [replace(c, persistence=persistence(stream, c)) for c in ranked]


def _spike(x: Tensor, tokens: Sequence[int]) -> Spike:
    row, channel = divmod(int(x.abs().argmax()), x.shape[1])
    return Spike(float(x[row, channel]), tokens[row], channel)


def _larger(a: ModuleScan, b: ModuleScan) -> ModuleScan:
    spikes = ((a.input, b.input), (a.output, b.output))
    return ModuleScan(
        a.layer, a.module, *(max(pair, key=lambda s: abs(s.value)) for pair in spikes)
    )


def _candidate(o: Observation, x: Tensor, y: Tensor, tokens: Sequence[int]) -> Candidate:
    row, out_channel = divmod(int(y.abs().argmax()), y.shape[1])
    weight = weight_out_in(o.module)[out_channel].float()  # (in,)
    contributions = weight * x[row]
    in_channel = int(contributions.abs().argmax())
    bias, output = bias_out(o.module), float(y[row, out_channel])
    contribution, size = float(contributions[in_channel]), abs(output) or 1.0
    return Candidate(
        address=WeightAddress(o.layer, o.name, out_channel, in_channel),
        weight=float(weight[in_channel]),
        input_value=float(x[row, in_channel]),
        output_value=output,
        token=tokens[row],
        contribution=contribution,
        contribution_share=abs(contribution) / size,
        bias_share=None if bias is None else abs(float(bias[out_channel])) / size,
        persistence=0.0,  # known once the later blocks have run
    )
