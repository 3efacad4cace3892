"""Intervals against brute force and known distributions; verdicts, rates and times by hand."""

from collections.abc import Callable

import numpy as np
import pytest

from swlora.evaluation import bootstrap
from swlora.evaluation.bootstrap import Interval
from swlora.evaluation.scores import SegmentStatistics
from swlora.evaluation.segments import Segments
from swlora.result_json import as_json
from swlora.study import statistics as stats
from swlora.study.statistics import Point

MakeSegments = Callable[..., Segments]


# Bootstrap


def test_draws_equal_scoring_every_resample_again(make_segments: MakeSegments) -> None:
    """The obvious loop: repeat the drawn prompts, score them, average over the drawn seeds."""
    segments = {s: make_segments(0.6 + 0.05 * s, 1.2 + 0.1 * s, s, n=13) for s in (2, 0, 5)}
    n_draws = 25
    found = stats.bootstrap(segments, n_draws)
    prompts = bootstrap.prompt_weights(13, n_draws).astype(int)
    shares = stats.seed_weights([0, 2, 5], n_draws)
    assert set(found) == {"BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr", "NLL"}
    for k in range(n_draws):
        chosen = np.repeat(np.arange(13), prompts[k])
        expected = dict.fromkeys(found, 0.0)
        for share, seed in zip(shares[k], (0, 2, 5), strict=True):
            scores = segments[seed].statistics.corpus(chosen)
            nats, tokens = segments[seed].sum_nats[chosen], segments[seed].n_tokens[chosen]
            scores["NLL"] = float(nats.sum() / tokens.sum())
            for name in expected:
                expected[name] += share * scores[name]
        assert {name: draws[k] for name, draws in found.items()} == pytest.approx(expected)


def test_a_draw_holds_as_many_prompts_as_there_are_and_one_seed_less() -> None:
    weights = bootstrap.prompt_weights(7, 50)
    assert weights.shape == (50, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert (weights != weights[0]).any()
    drawn = stats.seed_weights([3, 1, 4], 50) * 2
    assert (drawn == drawn.round()).all()
    assert (drawn.sum(axis=1) == 2).all()
    assert (stats.seed_weights([9], 50) == 1).all()


@pytest.mark.parametrize("n_seeds", [2, 3, 5])
def test_drawn_seeds_vary_like_the_mean_of_the_seeds(n_seeds: int) -> None:
    """The variance of a mean is s^2 / S; drawing S of S would give (S - 1) / S of that."""
    values = np.random.default_rng(n_seeds).normal(size=n_seeds)
    draws = stats.seed_weights(range(n_seeds), 40_000) @ values
    assert draws.var() == pytest.approx(values.var(ddof=1) / n_seeds, rel=0.04)
    assert draws.mean() == pytest.approx(values.mean(), abs=0.02)


def losses_only(nats: np.ndarray) -> Segments:
    """Prompts of one token each, with these losses and scores that do not matter."""
    ones = np.ones((len(nats), 10))
    statistics = SegmentStatistics(
        ones, ones, None, ones[:, 0], ones[:, 0], meteor_reason="", tokenizer="python"
    )
    return Segments(statistics, nats, np.ones(len(nats)))


def test_intervals_cover_what_they_promise() -> None:
    """95 % of the intervals of the mean of 60 exponential losses hold its true value, 1."""
    rng = np.random.default_rng(0)
    n_times, hits = 400, 0
    for _ in range(n_times):
        draws = stats.bootstrap({0: losses_only(rng.exponential(size=60))}, n_draws=300)["NLL"]
        low, high = bootstrap.interval(draws)
        hits += low < 1 < high
    # Percentile intervals of a skewed sample of 60 fall a little short; 3 sd of the count is 0.033
    assert 0.895 < hits / n_times < 0.983


def test_an_interval_of_a_normal_sample_has_the_known_width() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, size=2000)
    low, high = bootstrap.interval(stats.bootstrap({0: losses_only(values)})["NLL"])
    half = 1.96 * values.std(ddof=1) / np.sqrt(2000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_paired_differences_forget_what_prompts_have_in_common() -> None:
    """Losses differ between prompts by 10, between arms by 0.1: only pairing can show that."""
    rng = np.random.default_rng(2)
    prompts = rng.normal(20, 10, size=100)
    base = {s: losses_only(prompts + rng.normal(0, 0.01, 100)) for s in (0, 1)}
    worse = {s: losses_only(b.sum_nats + 0.1) for s, b in base.items()}
    draws, base_draws = stats.bootstrap(worse)["NLL"], stats.bootstrap(base)["NLL"]
    own = bootstrap.interval(draws)
    assert own.high - own.low > 3
    assert bootstrap.interval(draws - base_draws) == pytest.approx((0.1, 0.1))


def test_a_score_that_one_seed_lacks_is_left_out(make_segments: MakeSegments) -> None:
    mixed = {0: make_segments(0.7, 1.3, 0), 1: make_segments(0.7, 1.3, 1, meteor=False)}
    assert "METEOR" not in stats.bootstrap(mixed, 5)
    with pytest.raises(ValueError, match=r"\[9, 41\] prompts"):
        stats.bootstrap({0: make_segments(0.7, 1.3), 1: make_segments(0.7, 1.3, n=9)}, 5)


# Verdicts


@pytest.mark.parametrize(
    ("low", "high", "on_score", "on_loss"),
    [
        (-0.4, 0.3, "non-inferior", "non-inferior"),
        (-0.6, 0.3, "undecided", "non-inferior"),
        (-0.3, 0.6, "non-inferior", "undecided"),
        (-0.5, 0.5, "undecided", "undecided"),  # on the margin is not within it
        (-2.0, -0.6, "inferior", "non-inferior"),
        (-2.0, -0.5, "undecided", "non-inferior"),
        (0.6, 2.0, "non-inferior", "inferior"),
        (0.0, 0.0, "non-inferior", "non-inferior"),
    ],
)
def test_verdicts_with_a_margin_of_a_half(
    low: float, high: float, on_score: str, on_loss: str
) -> None:
    difference = Interval(low, high)
    assert stats.verdict(difference, 0.5, larger_is_better=True) == on_score
    assert stats.verdict(difference, 0.5, larger_is_better=False) == on_loss


# Speed


def test_the_rate_leaves_out_the_first_steps() -> None:
    seconds = [100.0, *[2.0] * 39]
    metrics = [{"rows": 8 * (i + 1), "elapsed_s": sum(seconds[: i + 1])} for i in range(40)]
    assert stats.steady_rate(metrics) == pytest.approx(4.0)
    assert stats.steady_rate(metrics[:10]) == pytest.approx(4.0)  # one step at least is left out
    assert stats.steady_rate(metrics[:1]) == pytest.approx(0.08)
    slow = [{"rows": 8 * (i + 1), "elapsed_s": [50.0, 100.0][i > 0] + 2 * i} for i in range(40)]
    assert stats.steady_rate(slow) == pytest.approx(4.0)  # 5 % of 40 steps are two


CURVE = [Point(10, 5.0, 3.0), Point(20, 10.0, 2.0), Point(30, 15.0, 2.2), Point(40, 25.0, 1.0)]


@pytest.mark.parametrize(
    ("target", "seconds"),
    [
        (2.5, 7.5),
        (2.0, 10.0),
        (1.6, 20.0),  # half way between 2.2 and 1.0
        (1.0, 25.0),
        (0.99, None),
        (3.0, 5.0),
        (4.0, 5.0),  # better from the first point on: no earlier time is known
    ],
)
def test_seconds_to_a_loss(target: float, seconds: float | None) -> None:
    found = stats.seconds_to(target, CURVE)
    assert found == (None if seconds is None else pytest.approx(seconds))
    assert stats.seconds_to(target, []) is None


def test_the_mean_curve_has_the_steps_that_all_seeds_have() -> None:
    other = [Point(20, 12.0, 2.4), Point(40, 27.0, 1.2), Point(50, 30.0, 1.0)]
    assert stats.mean_curve([CURVE, other]) == [
        pytest.approx((20, 11.0, 2.2)),
        pytest.approx((40, 26.0, 1.1)),
    ]
    assert stats.mean_curve([CURVE]) == CURVE
    assert stats.mean_curve([]) == stats.mean_curve([CURVE, []]) == []


def test_held_out_points_are_read_from_the_metrics() -> None:
    line = {"step": 1, "elapsed_s": 2.0, "loss": 9.0}
    measured = {**line, "step": 2, "eval_sum_nats": 30.0, "eval_n_tokens": 20}
    assert stats.held_out_points([line, measured]) == [Point(2, 2.0, 1.5)]


def test_what_faster_means() -> None:
    assert stats.time_saved_percent(50, 200) == 75
    assert stats.time_saved_percent(300, 200) == -50
    assert stats.speed_up_percent(40, 10) == 300
    assert stats.speed_up_percent(5, 10) == -50


def test_spread_over_seeds() -> None:
    assert as_json(stats.spread([2.0, 4.0, 9.0])) == {
        "mean": 5.0,
        "min": 2.0,
        "max": 9.0,
        "sd": pytest.approx(np.sqrt(13)),
    }
    assert stats.spread([2.0]).sd is None
