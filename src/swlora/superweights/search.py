"""The search for super weights: zero the leading candidate, run again, until nothing is massive.

One large super weight hides smaller ones, so the paper repeats its scan (arXiv 2411.07191, section
3.1). An activation is measured against the median magnitude of its state, over tokens and channels:

    ratio = max over blocks l of  max |h_l| / median |h_l|

A prompt has a massive activation where that is at least `MASSIVE_RATIO`. It counts as suppressed
below that, or below `SUPPRESSED_SHARE` of what it was. Blocks from the first that takes the intact
model's super activation away are left out, for a remover without its activation makes a new spike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any, Literal

import torch

from swlora.errors import UserError
from swlora.models.anatomy import Anatomy, WeightAddress, context_tokens
from swlora.result_json import FLAT, NO_KEY
from swlora.superweights.ablate import zeroed
from swlora.superweights.detect import (
    Candidate,
    Scan,
    Trace,
    leading_bos,
    prompt_tokens,
    trace,
)

PROMPTS = (
    "Apple Inc. is a worldwide tech company.",
    "The river was quiet that morning, and nobody spoke.",
    "def add(a, b):\n    return a + b",
)
# Massive activations of large models are about 1,000 times the median (arXiv 2402.17762). This is
# lower, so that narrow models are searched too; a random one has about 10.
MASSIVE_RATIO = 30.0
SUPPRESSED_SHARE = 0.1
LEADING_SHARE = 0.1  # of its spike; a weight that makes less cannot suppress it
REMOVAL_SHARE = 0.2
Outcome = Literal["nothing massive", "suppressed", "no single weight", "rounds used up"]


@dataclass(frozen=True)
class Activation:
    """The residual stream's largest value against the median, after block `layer`."""

    layer: int
    token: int
    channel: int
    value: float
    ratio: float


@dataclass(frozen=True)
class Setting:
    """A prompt with or without BOS in the intact model, and its super activation.

    `path` is the residual stream at that token and channel after every block.
    """

    prompt: str
    has_bos: bool
    tokens: list[str] = field(metadata=NO_KEY)
    activation: Activation
    is_massive: bool
    path: list[float] = field(metadata=NO_KEY)
    removal_layers: list[int]


@dataclass(frozen=True)
class Round:
    """One weight set to zero, together with those of the rounds before.

    `n_settings` is the number of settings in which it led. `ratios`, one a setting, and `path`, at
    the super activation of the first setting, were measured with the weight at zero.
    """

    address: WeightAddress = field(metadata=FLAT)
    n_settings: int
    ratios: list[float]
    path: list[float] = field(metadata=NO_KEY)


@dataclass(frozen=True)
class Finding:
    """A candidate, as it was where its contribution is largest, and the settings that agree.

    `mean_contribution` is the mean of |contribution| over all settings, 0 where it is none.
    `round` is the number of the round, from 0, that set it to zero; None where none did.
    """

    candidate: Candidate
    n_settings: int
    mean_contribution: float
    round: int | None


@dataclass(frozen=True)
class Search:
    """What a search found; `scan`, `path` and `removal_layers` are the first setting's.

    That is the first prompt as the tokenizer itself would have it. `removal_layers` is empty where
    nothing is massive.
    """

    settings: list[Setting]
    candidates: list[Finding] = field(metadata=NO_KEY)
    rounds: list[Round]
    outcome: Outcome
    scan: Scan = field(metadata=NO_KEY)
    path: list[float] = field(metadata=NO_KEY)
    removal_layers: list[int] = field(metadata=NO_KEY)


def search(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str] = PROMPTS,
    *,
    max_candidates: int,
    max_rounds: int = 6,
) -> Search:
    """Search a model for super weights with several prompts, each with and without BOS.

    A round zeroes the weight with the largest contribution, summed over the settings whose massive
    activation is not suppressed yet, among their candidates that persist. Candidates come in the
    order of the rounds, then by mean contribution to the intact model, `max_candidates` at most.
    Every weight is what it was afterwards, bit for bit, also when something is raised.
    Raises UserError where there is no prompt, or one without tokens or with too many.
    """
    if max_candidates < 1 or max_rounds < 1:
        raise UserError("a search needs at least one candidate and one round")
    anatomy = Anatomy(model)
    sequences = _sequences(model, tokenizer, prompts)
    token_ids = [ids for _, _, ids in sequences]
    intact = trace(anatomy, token_ids)
    settings = [
        _setting(prompt, has_bos, tokenizer.convert_ids_to_tokens(ids), t)
        for (prompt, has_bos, ids), t in zip(sequences, intact, strict=True)
    ]
    rounds, outcome, seen = _rounds(anatomy, token_ids, settings, intact, max_rounds)
    lead, lead_candidates = settings[0], intact[0].candidates[:max_candidates]
    modules, residual = intact[0].modules, intact[0].residual()
    return Search(
        settings=settings,
        candidates=_merged(seen, intact)[:max_candidates],
        rounds=rounds,
        outcome=outcome,
        scan=Scan(lead.prompt, lead.tokens, modules, residual, lead_candidates),
        path=lead.path,
        removal_layers=lead.removal_layers,
    )


def removal_layers(path: Sequence[float]) -> list[int]:
    """Return the layers in which a super activation is taken away again.

    `path` is its value after every block. From the largest value on, a layer removes what it
    cancels of the value before it: the change must have the opposite sign, and going past zero
    cancels no more than all. The layers that cancel at least a fifth of the largest value count.
    """
    birth = max(range(len(path)), key=lambda layer: abs(path[layer]))
    peak = abs(path[birth])
    upright = [value if path[birth] > 0 else -value for value in path]
    cancelled = {
        layer: before - max(0.0, after)
        for layer, (before, after) in enumerate(pairwise(upright), start=1)
        if layer > birth
    }
    return [layer for layer, value in cancelled.items() if value >= REMOVAL_SHARE * peak > 0]


def _rounds(
    anatomy: Anatomy,
    token_ids: list[list[int]],
    settings: list[Setting],
    intact: list[Trace],
    max_rounds: int,
) -> tuple[list[Round], Outcome, dict[WeightAddress, list[Trace]]]:
    """Return the rounds, why they ended, and what was seen before each weight went to zero."""
    rounds: list[Round] = []
    seen: dict[WeightAddress, list[Trace]] = {}
    traces = intact
    place = settings[0].activation
    while pending := [i for i, s in enumerate(settings) if _is_massive(s, traces[i])]:
        leader = _leader([_eligible(settings[i], traces[i]) for i in pending])
        if leader is None:
            return rounds, "no single weight", seen
        if len(rounds) == max_rounds:
            return rounds, "rounds used up", seen
        address, n_settings = leader
        seen[address] = traces
        with zeroed(anatomy, list(seen)):
            traces = trace(anatomy, token_ids)
        ratios = [_activation(t, _n_blocks(s)).ratio for s, t in zip(settings, traces, strict=True)]
        path = traces[0].path(place.token, place.channel)
        rounds.append(Round(address, n_settings, ratios, path))
    return rounds, "suppressed" if rounds else "nothing massive", seen


def _sequences(
    model: Any, tokenizer: Any, prompts: Sequence[str]
) -> list[tuple[str, bool, list[int]]]:
    """Return (prompt, has BOS, token ids), for every prompt the tokenizer's own way first.

    Whether a tokenizer puts BOS is read off its ids.
    """
    if not prompts:
        raise UserError("a search needs at least one prompt")
    bos = tokenizer.bos_token_id
    sequences: list[tuple[str, bool, list[int]]] = []
    for prompt in dict.fromkeys(prompts):
        own = prompt_tokens(model, tokenizer, prompt)
        n_bos = len(leading_bos(tokenizer, own))
        sequences.append((prompt, n_bos > 0, own))
        other = own[n_bos:] if n_bos else [bos, *own]
        if bos is not None and 0 < len(other) <= context_tokens(model):
            sequences.append((prompt, n_bos == 0, other))
    return sequences


def _setting(prompt: str, has_bos: bool, tokens: list[str], intact: Trace) -> Setting:
    # An activation that nothing carries on is not a super activation, so the last block is out
    n_blocks = max(1, len(intact.stream) - 2)
    activation = _activation(intact, n_blocks)
    path = intact.path(activation.token, activation.channel)
    is_massive = activation.ratio >= MASSIVE_RATIO
    removal = removal_layers(path) if is_massive else []
    return Setting(prompt, has_bos, tokens, activation, is_massive, path, removal)


def _activation(t: Trace, n_blocks: int) -> Activation:
    """Return the largest value against the median after any of the first `n_blocks` blocks."""
    sizes = t.stream[1 : n_blocks + 1].abs()  # (n_blocks, T, D)
    medians = sizes.flatten(1).median(dim=1).values.clamp_min(torch.finfo(sizes.dtype).tiny)
    ratios = sizes.flatten(1).amax(dim=1) / medians
    layer = int(ratios.argmax())
    token, channel = divmod(int(sizes[layer].argmax()), sizes.shape[2])
    value = float(t.stream[layer + 1, token, channel])
    return Activation(layer, token, channel, value, float(ratios[layer]))


def _n_blocks(setting: Setting) -> int:
    """Return how many blocks run before the super activation is taken away, or the model ends."""
    return min([*setting.removal_layers, max(1, len(setting.path) - 1)])


def _is_massive(setting: Setting, t: Trace) -> bool:
    ratio = _activation(t, _n_blocks(setting)).ratio
    return ratio >= max(MASSIVE_RATIO, SUPPRESSED_SHARE * setting.activation.ratio)


def _eligible(setting: Setting, t: Trace) -> list[Candidate]:
    n_blocks = _n_blocks(setting)
    return [
        c
        for c in t.candidates
        if c.persistence > 0
        and c.contribution_share >= LEADING_SHARE
        and c.address.layer < n_blocks
    ]


def _leader(candidates: list[list[Candidate]]) -> tuple[WeightAddress, int] | None:
    """Return the address whose contributions sum up to most, and in how many settings it leads."""
    leaders = [max(found, key=_size).address for found in candidates if found]
    sums: dict[WeightAddress, float] = {}
    for c in chain.from_iterable(candidates):
        sums[c.address] = sums.get(c.address, 0.0) + _size(c)
    if not sums:
        return None
    address = max(sums, key=lambda a: sums[a])
    return address, leaders.count(address)


def _merged(seen: dict[WeightAddress, list[Trace]], intact: list[Trace]) -> list[Finding]:
    """Return all candidates, one an address: those of the rounds, then the intact model's."""
    picked = [
        _finding(address, traces, number) for number, (address, traces) in enumerate(seen.items())
    ]
    others = dict.fromkeys(c.address for t in intact for c in t.candidates if c.address not in seen)
    found = [_finding(address, intact, None) for address in others]
    return picked + sorted(found, key=lambda f: -f.mean_contribution)


def _finding(address: WeightAddress, traces: list[Trace], number: int | None) -> Finding:
    same = [c for t in traces for c in t.candidates if c.address == address]
    mean = sum(map(_size, same)) / len(traces)
    return Finding(max(same, key=_size), len(same), mean, number)


def _size(candidate: Candidate) -> float:
    return abs(candidate.contribution)
