"""Choosing a token: the nucleus by a full sort, frequencies by chi-square, seeds by repetition."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swlora.engine.sampling import Chooser, Sampling, nucleus
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


def test_what_means_nothing_is_refused() -> None:
    for settings_ in (
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0.0},
        {"logprobs": -1},
        {"temperature": math.nan},
    ):
        with pytest.raises(UserError):
            Sampling(**settings_)  # type: ignore[arg-type]
