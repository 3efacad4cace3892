"""`auto:BUDGET`: when it measures at all, what it proposes, and what it takes."""

from dataclasses import asdict

import numpy as np
import pytest

from swlora.config import AdapterSpec, RunSpec, TrainSpec
from swlora.errors import RunFailedError, UserError
from swlora.progress import Silent
from swlora.training import layer_choice
from swlora.training.layer_choice import (
    Forecast,
    Trial,
    decide,
    lines,
    middle_layers,
    options_of,
    propose,
)
from swlora.training.layer_profile import LayerProfile
from swlora.training.layer_trial import TrialLosses, TrialPlan

pytestmark = pytest.mark.usefixtures("short_trials")


def _profile(norms, *, head=6.0, frozen=0.3, trained=1.0, cached=True):
    return LayerProfile(list(norms), head, frozen, trained, cached)


def _forecast(found, *, n_rows=1000, n_epochs=1, spent_s=0.0, n_trial=8):
    plan = TrialPlan(100, 50, n_trial, 3, 4, [[np.arange(4)]] * 9, [[np.arange(4)]])
    return Forecast(found, plan, n_rows, n_epochs, spent_s)


def _time_by_hand(found, lowest, passes):
    n = len(found.gradient_norms)
    one = (n - lowest) * found.trained_block_s + found.head_s
    return lowest * found.frozen_block_s + one * max(1.0, passes)


@pytest.mark.parametrize("norms", [[1.0] * 6, [1, 2, 3, 4, 5, 60], [50, 1, 1, 1, 1, 1.0]])
@pytest.mark.parametrize("budget", [0.4, 0.7, 0.99])
@pytest.mark.parametrize("n_epochs", [1, 5])
def test_the_least_time_to_quality_within_the_budget_is_proposed(norms, budget, n_epochs):
    found = _profile(norms, head=1.0)
    forecast = _forecast(found, n_rows=10**9, n_epochs=n_epochs)  # measuring costs nothing
    in_budget = {
        lowest: _time_by_hand(found, lowest, sum(norms) / sum(norms[lowest:]))
        for lowest in range(1, 6)
        if _time_by_hand(found, lowest, n_epochs) <= budget * _time_by_hand(found, 0, n_epochs)
    }
    proposed = propose(options_of(forecast), budget)
    if not in_budget:
        assert proposed is None
        return
    best = min(in_budget, key=in_budget.__getitem__)
    assert proposed.lowest == best
    assert proposed.time_to_quality_s == pytest.approx(in_budget[best])


def test_states_that_are_not_kept_are_paid_for_in_every_epoch():
    kept, not_kept = (_profile([1.0] * 10, head=1.0, cached=cached) for cached in (True, False))
    assert kept.training_s(6, 5) == pytest.approx(6 * 0.3 + 5 * 5.0)
    assert not_kept.training_s(6, 5) == pytest.approx(5 * (6 * 0.3 + 5.0))


def test_the_time_of_measuring_counts():
    """12 s an example with all layers, 6.4 + 0.9 with the upper half; 3 + 6 with the middle."""
    found, n_rows = _profile([1.0] * 6), 1000
    spent_s = 500.0
    forecast = _forecast(found, n_rows=n_rows, spent_s=spent_s)
    more = 12.0 / (0.9 + 9.0)
    assert forecast.trial_steps(3) == round(8 * more) == 10
    first, steps = middle_layers(6, 3)[0], forecast.trial_steps(1)
    assert (first, steps) == (1, round(8 * 12 / 11.3))
    trials_s = 4 * (8 * 12.0 + 10 * 9.9 + steps * 11.3 + 6 * (6 * 0.3 + 6.0))
    share = (spent_s + trials_s + n_rows * 9.9) / (n_rows * 12.0)
    assert options_of(forecast)[3].share_of_time == pytest.approx(share)
    assert propose(options_of(forecast), share - 1e-6).lowest > 3


def test_a_model_without_gradient_is_refused():
    with pytest.raises(RunFailedError, match="no gradient"):
        options_of(_forecast(_profile([0.0] * 4)))


def _trials(everything, last, middle_loss, *, shares=(1.0, 0.45, 0.48), early=1.5):
    return [
        Trial("all", list(range(6)), shares[0], 8, everything, everything),
        Trial("last:2", [4, 5], shares[1], 13, last, last and early),
        Trial("middle", [2, 3], shares[2], 10, middle_loss, middle_loss),
    ]


LOSSES = [1.0, 1.1, 1.2, None]


@pytest.mark.parametrize("middle_share", [0.48, 0.8])
@pytest.mark.parametrize("everything", LOSSES)
@pytest.mark.parametrize("last", LOSSES)
@pytest.mark.parametrize("middle_loss", LOSSES)
def test_what_did_worst_is_never_taken(everything, last, middle_loss, middle_share):
    trials = _trials(everything, last, middle_loss, shares=(1.0, 0.45, middle_share))
    choice = decide(trials, 0.5, {})
    taken = next(trial for trial in trials if trial.layers == choice.layers)
    loss = {trial.name: trial.loss_nats or np.inf for trial in trials}
    assert loss[taken.name] <= max(loss[name] for name in loss if name != taken.name)
    assert loss[taken.name] <= loss["all"]
    assert taken.share_of_time <= 0.5 or taken.name == "all"
    if loss["last:2"] < min(loss["all"], loss["middle"]):
        assert taken.name == "last:2"


def test_it_says_what_it_expects_to_lose():
    kept = decide(_trials(1.3, 1.25, 1.4, early=1.34), 0.5, {})
    assert (kept.layers, kept.expected_loss_nats) == ([4, 5], pytest.approx(0.04))
    assert "take 0.45 of the time and are expected to end 0.040 nats a token above" in kept.reason
    given_up = decide(_trials(1.3, 1.352, 1.4), 0.5, {})
    assert given_up.layers == list(range(6))
    assert "layers 4-5, ended 0.052 nats a token above them" in given_up.reason


def test_the_table_shows_every_trial_and_marks_what_was_taken():
    trials = _trials(1.3, 1.25, None)
    measured = {"trials": trials, "measured_s": 7.2, "loss_before_nats": 4.0}
    choice = decide(trials, 0.5, measured)
    shown = list(lines(choice))
    assert shown[0].startswith("7 s of measuring, with all layers 8 steps;")
    assert [line.split()[0] for line in shown[2:5]] == ["0-5", "4-5", "2-3"]
    assert [line.endswith("<- taken") for line in shown[2:5]] == [False, True, False]
    assert "diverged" in shown[4]


def _spec(epochs, **adapter):
    train = TrainSpec(batch_size=2, epochs=epochs, learning_rate=0.02)
    return RunSpec(adapter=AdapterSpec(rank=2, alpha=4, **adapter), train=train)


def test_a_short_training_takes_all_layers_and_measures_nothing(make_model, sequences, monkeypatch):
    monkeypatch.setattr(layer_choice, "profile", lambda *_: pytest.fail("it measured"))
    choice = layer_choice.choose(make_model("llama"), sequences, _spec(3), 0.5, Silent())
    assert choice.layers == [0, 1, 2]
    assert choice.measured_s == 0
    assert "of the 18 steps the budget can save the time of 9 at most" in choice.reason


def _measured_model(monkeypatch, model, sequences, losses, *, epochs=40, budget=0.6):
    """Run the choice with a rigged profile and rigged trials; return (choice, layers tried)."""
    tried = {}

    def fake_trial(_model, _sequences, _spec, layers, _plan, *, n_steps, advance):
        tried[tuple(layers)] = n_steps
        return TrialLosses(4.0, losses[len(tried) - 1] + 0.1, losses[len(tried) - 1])

    found = _profile([1.0] * 3, head=1e-3, frozen=1e-3, trained=1e-2)
    monkeypatch.setattr(layer_choice, "profile", lambda *_: found)
    monkeypatch.setattr(layer_choice, "try_layers", fake_trial)
    choice = layer_choice.choose(model, sequences, _spec(epochs), budget, Silent())
    return choice, tried


def test_the_choice_follows_the_trial(make_model, sequences, monkeypatch):
    model = make_model("llama")
    worse, tried = _measured_model(monkeypatch, model, sequences, [1.0, 1.3, 1.2])
    # 40 epochs take 1.24 s an example, with the last layer 0.442, with the middle one 0.841
    assert tried == {(0, 1, 2): 8, (2,): round(8 * 1.24 / 0.442), (1,): round(8 * 1.24 / 0.841)}
    assert worse.layers == [0, 1, 2]
    assert "layers 2, ended 0.300 nats" in worse.reason
    better, _ = _measured_model(monkeypatch, model, sequences, [1.0, 0.9, 1.2])
    assert better.layers == [2]
    assert [trial["name"] for trial in asdict(better)["trials"]] == ["all", "last:1", "middle"]


def test_a_budget_that_nothing_keeps_means_all_layers(make_model, sequences, monkeypatch):
    choice, tried = _measured_model(monkeypatch, make_model("llama"), sequences, [], budget=0.2)
    assert (choice.layers, tried) == ([0, 1, 2], {})
    assert "no fewer keep the budget; the least takes 0." in choice.reason


def test_a_family_without_trees_is_refused(make_model, sequences):
    with pytest.raises(UserError, match="needs prefix trees"):
        layer_choice.choose(make_model("falcon"), sequences, _spec(40), 0.5, Silent())
