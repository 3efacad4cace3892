"""Intervals against brute force and known distributions; verdicts, rates and times by hand."""

from collections.abc import Callable

import numpy as np
import pytest

from swlora.evaluation import bootstrap
from swlora.evaluation.bootstrap import Draws, Interval
from swlora.evaluation.scores import SegmentStatistics
from swlora.evaluation.segments import Segments
from swlora.result_json import as_json
from swlora.study import statistics as stats
from swlora.study.statistics import Point

MakeSegments = Callable[..., Segments]


# Bootstrap


def bootstrapped(segments: dict[int, Segments], name: str = "NLL", n_draws: int = 1000) -> Draws:
    return stats.over_seeds(stats.seed_draws(segments, n_draws)[name])


def test_draws_equal_scoring_every_resample_again(make_segments: MakeSegments) -> None:
    """The obvious loop: repeat the drawn prompts and score them, run by run."""
    segments = {s: make_segments(0.6 + 0.05 * s, 1.2 + 0.1 * s, s, n=13) for s in (2, 0, 5)}
    n_draws = 25
    found = stats.seed_draws(segments, n_draws)
    prompts = bootstrap.prompt_weights(13, n_draws).astype(int)
    assert set(found) == {"BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr", "NLL"}
    assert all(list(by_seed) == [0, 2, 5] for by_seed in found.values())
    for k in range(n_draws):
        chosen = np.repeat(np.arange(13), prompts[k])
        for seed, of_run in segments.items():
            scores = of_run.statistics.corpus(chosen)
            nats, tokens = of_run.sum_nats[chosen], of_run.n_tokens[chosen]
            scores["NLL"] = float(nats.sum() / tokens.sum())
            drawn = {name: by_seed[seed][k] for name, by_seed in found.items()}
            assert drawn == pytest.approx({name: scores[name] for name in found})


def test_a_draw_holds_as_many_prompts_as_there_are() -> None:
    weights = bootstrap.prompt_weights(7, 50)
    assert weights.shape == (50, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert (weights != weights[0]).any()


# Of Student's distribution, two-sided 95 %, from a table
@pytest.mark.parametrize(("n_seeds", "student"), [(2, 12.706), (3, 4.303), (5, 2.776), (9, 2.306)])
def test_the_interval_of_few_seeds_is_as_wide_as_students(n_seeds: int, student: float) -> None:
    values = np.random.default_rng(n_seeds).normal(size=n_seeds)
    draws = stats.over_seeds({seed: np.full(1000, v) for seed, v in enumerate(values)})
    half = student * values.std(ddof=1) / np.sqrt(n_seeds)
    low, high = bootstrap.interval(draws)
    assert low == pytest.approx(values.mean() - half, abs=0.04 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.04 * half)
    assert (stats.over_seeds({7: draws}) == draws).all()


@pytest.mark.parametrize("n_seeds", [2, 3, 5])
def test_intervals_over_seeds_hold_the_true_mean_as_often_as_they_say(n_seeds: int) -> None:
    """Losses of 60 prompts, drawn anew, and a shift of each seed's own; the truth is 1."""
    rng, n_times, hits = np.random.default_rng(n_seeds), 200, 0
    for _ in range(n_times):
        prompts = rng.normal(1, 0.3, 60)
        runs = {s: losses_only(prompts + rng.normal(0, 0.1)) for s in range(n_seeds)}
        low, high = bootstrap.interval(bootstrapped(runs, n_draws=300))
        hits += low < 1 < high
    assert hits / n_times > 0.91  # 3 sd of the count is 0.046; drawn seeds: 0.6 and 0.8 for 2 and 3


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
        draws = bootstrapped({0: losses_only(rng.exponential(size=60))}, n_draws=300)
        low, high = bootstrap.interval(draws)
        hits += low < 1 < high
    # Percentile intervals of a skewed sample of 60 fall a little short; 3 sd of the count is 0.033
    assert 0.895 < hits / n_times < 0.983


def test_an_interval_of_a_normal_sample_has_the_known_width() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, size=2000)
    low, high = bootstrap.interval(bootstrapped({0: losses_only(values)}))
    half = 1.96 * values.std(ddof=1) / np.sqrt(2000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_paired_differences_forget_what_prompts_have_in_common() -> None:
    """Losses differ between prompts by 10, between arms by 0.1: only pairing can show that."""
    rng = np.random.default_rng(2)
    prompts = rng.normal(20, 10, size=100)
    base = {s: losses_only(prompts + rng.normal(0, 0.01, 100)) for s in (0, 1)}
    worse = {s: losses_only(b.sum_nats + 0.1) for s, b in base.items()}
    own = bootstrap.interval(bootstrapped(worse))
    assert own.high - own.low > 3
    of_worse, of_base = (stats.seed_draws(runs)["NLL"] for runs in (worse, base))
    assert bootstrap.interval(stats.differences(of_worse, of_base)) == pytest.approx((0.1, 0.1))


def test_a_difference_is_of_the_seeds_that_both_have() -> None:
    """The baseline's third seed says nothing of an arm that has none; nor do other seeds pair."""
    rng = np.random.default_rng(3)
    base = {s: rng.normal(s, 0.1, 50) for s in (0, 1, 2)}
    arm = {s: base[s] + 0.5 for s in (0, 1)}
    assert stats.differences(arm, base) == pytest.approx(0.5)
    assert stats.differences({1: base[1]}, base) == pytest.approx(0)
    others = {7: base[0], 8: base[1]}
    unpaired = stats.differences(others, base)
    assert (unpaired == stats.over_seeds(others) - stats.over_seeds(base)).all()


def test_a_score_that_one_seed_lacks_is_left_out(make_segments: MakeSegments) -> None:
    mixed = {0: make_segments(0.7, 1.3, 0), 1: make_segments(0.7, 1.3, 1, meteor=False)}
    assert "METEOR" not in stats.seed_draws(mixed, 5)
    with pytest.raises(ValueError, match=r"\[9, 41\] prompts"):
        stats.seed_draws({0: make_segments(0.7, 1.3), 1: make_segments(0.7, 1.3, n=9)}, 5)


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


def test_the_mean_curve_has_the_steps_that_all_seeds_have_until_they_end() -> None:
    other = [Point(20, 12.0, 2.4), Point(40, 27.0, 1.2), Point(50, 30.0, 0.6)]
    assert stats.mean_curve([CURVE, other]) == [
        pytest.approx((20, 11.0, 2.2)),
        pytest.approx((40, 26.0, 1.1)),
        pytest.approx((50, 27.5, 0.8)),  # the first ended at 40, at 1.0
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
