"""Choosing a token: the nucleus by a full sort, frequencies by chi-square, seeds by repetition."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swlora.decoding.sampling import Chooser, Sampling, candidates, nucleus
from swlora.errors import UserError

LOGITS = torch.randn(37, generator=torch.Generator().manual_seed(4)) * 2


def nucleus_by_sorting(p: list[float], top_p: float) -> list[int]:
    kept, total = [], 0.0
    for token in sorted(range(len(p)), key=lambda i: (-p[i], i)):
        if total >= top_p:
            break
        kept.append(token)
        total += p[token]
    return kept


@settings(deadline=None)
@given(
    st.lists(st.floats(-9, 9, width=16), min_size=1, max_size=40),
    st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.99, 0.999999]),
)
def test_the_nucleus_is_that_of_a_full_sort(logits: list[float], top_p: float) -> None:
    p = torch.softmax(torch.tensor(logits), dim=-1)
    assert nucleus(p, top_p).tolist() == nucleus_by_sorting(p.tolist(), top_p)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.5, 0.7), (1, 0.3)])
def test_frequencies_are_those_of_the_nucleus(temperature: float, top_p: float) -> None:
    n = 6_000
    chooser = Chooser(Sampling(temperature=temperature, top_p=top_p, seed=5), [1])
    found = torch.tensor([chooser.choose(LOGITS).token_id for _ in range(n)])
    p = torch.softmax(LOGITS / temperature, dim=-1).double()
    kept = nucleus_by_sorting(p.tolist(), top_p)
    counts = torch.bincount(found, minlength=len(p)).double()
    assert set(counts.nonzero().flatten().tolist()) <= set(kept)
    expected = n * p[kept] / p[kept].sum()
    often = expected >= 5  # where chi-square holds
    assert int(often.sum()) > 1
    chi2 = ((counts[kept] - expected) ** 2 / expected)[often].sum()
    freedom = int(often.sum())
    assert float(chi2) < freedom + 5 * math.sqrt(2 * freedom)  # mean + 5 standard deviations


def draws(n: int = 30, **settings: Any) -> list[int]:
    chooser = Chooser(Sampling(**settings), [3, 4])
    return [chooser.choose(LOGITS).token_id for _ in range(n)]


def test_the_seed_decides() -> None:
    torch.manual_seed(1)
    first = draws(temperature=1.0, seed=2**64 - 1)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert draws(temperature=1.0, seed=2**64 - 1) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert draws(temperature=1.0, seed=0) != first


def test_a_draw_of_almost_one_is_a_token_that_can_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """u * total may round up to total; the last token of all has no probability here."""
    logits = torch.tensor([0.0, 0.1, -math.inf])
    monkeypatch.setattr(torch, "rand", lambda *_a, **_k: torch.ones(1, dtype=torch.float64))
    for top_p in (1.0, 0.999):
        sampling = Sampling(temperature=1.0, top_p=top_p)
        assert Chooser(sampling, [0]).choose(logits).token_id in (0, 1)


def test_a_seen_token_is_punished_once_however_often_it_came() -> None:
    logits = torch.tensor([2.0, 1.9, -0.5, -0.6])
    chooser = Chooser(Sampling(repetition_penalty=1.2), [0, 0, 2])
    assert [chooser.choose(logits).token_id for _ in range(2)] == [1, 0]
    scores = chooser._penalised(logits)
    torch.testing.assert_close(scores, torch.tensor([2 / 1.2, 1.9 / 1.2, -0.5 * 1.2, -0.6]))


def test_written_tokens_are_punished_by_the_formula_of_the_openai_api() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, c over what was written, not the prompt."""
    logits = torch.tensor([3.0, 2.9, 1.0, -1.0])
    settings_ = {"frequency_penalty": 0.25, "presence_penalty": 0.5}
    chooser = Chooser(Sampling(**settings_), [0, 1, 1, 2])
    counts = [0, 0, 0, 0]
    for _ in range(20):
        mu = [
            logit - count * 0.25 - (count > 0) * 0.5
            for logit, count in zip(logits.tolist(), counts, strict=True)
        ]
        torch.testing.assert_close(chooser._penalised(logits), torch.tensor(mu))
        token = chooser.choose(logits).token_id
        assert token == max(range(4), key=lambda j: mu[j])
        counts[token] += 1
    assert counts[0] and counts[1] and counts[2]


@pytest.mark.parametrize("top_p", [1.0, 0.6])
@pytest.mark.parametrize("top_k", [1, 5, 36, 37, 400])
def test_top_k_and_nucleus_keep_what_transformers_keeps(top_k: int, top_p: float) -> None:
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    ids = torch.zeros(1, 1, dtype=torch.long)
    scores = TopKLogitsWarper(top_k)(ids, LOGITS[None] / 1.3)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    expected = set(scores[0].isfinite().nonzero().flatten().tolist())
    found = candidates(torch.softmax(LOGITS / 1.3, dim=-1), top_k, top_p)
    assert (set(range(len(LOGITS))) if found is None else set(found.tolist())) == expected
    drawn = draws(300, temperature=1.3, top_k=top_k, top_p=top_p)
    assert set(drawn) <= expected
    assert len(set(drawn)) >= min(2, len(expected))


def test_what_means_nothing_is_refused() -> None:
    for settings_ in (
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0.0},
        {"logprobs": -1},
        {"top_k": -1},
        {"presence_penalty": math.inf},
        {"temperature": math.nan},
    ):
        with pytest.raises(UserError):
            Sampling(**settings_)  # type: ignore[arg-type]
