"""The learning rate that short trainings find: which are made, what is taken, what they leave."""

import math

import pytest
import torch
from tests.support.plain_training import hashes_of, held_out_nats, update

from swlora.adapters.methods import adapt, train_mode
from swlora.config import AdapterSpec, RunSpec, TrainSpec
from swlora.errors import RunFailedError
from swlora.progress import Silent
from swlora.training import rate_trial, short_training
from swlora.training.plain import PlainStep
from swlora.training.rate_trial import MOST_TRIALS, chosen, next_rate, offset
from swlora.training.schedule import Schedule

NEVER = math.inf


@pytest.mark.parametrize(
    ("loss_of", "tried"),
    [
        ({1: 3.0, 2: 2.0, 4: 1.0, 8: 2.0}, [1, 2, 4, 8]),
        ({1: 1.0, 2: 2.0, 0.5: 2.0}, [1, 2, 0.5]),
        ({1: 2.0, 2: 3.0, 0.5: 1.0, 0.25: 1.5}, [1, 2, 0.5, 0.25]),
        ({1: 1.0, 2: 1.0, 0.5: 1.0, 0.25: 1.0, 0.125: 2.0}, [1, 2, 0.5, 0.25, 0.125]),
        ({1: 2.0, 2: NEVER, 0.5: 3.0}, [1, 2, 0.5]),
        ({1: NEVER, 0.5: NEVER, 0.25: 2.0, 0.125: 3.0}, [1, 0.5, 0.25, 0.125]),
    ],
)
def test_rates_are_tried_until_both_sides_are_higher(loss_of, tried):
    losses = {}
    while (rate := next_rate(losses, 1)) is not None:
        losses[rate] = loss_of[rate]
    assert list(losses) == tried


@pytest.mark.parametrize("falls_with", [1, -1])
def test_trials_have_an_end(falls_with):
    losses = {}
    while (rate := next_rate(losses, 1)) is not None:
        losses[rate] = falls_with * rate
    assert len(losses) == MOST_TRIALS


@pytest.mark.parametrize(
    ("n_passes", "rate"),
    [(0.1, 4e-3), (1, 4e-3), (2, 2.8e-3), (3, 2.3e-3), (100, 4e-4)],  # 4e-3 / sqrt(3) = 2.31e-3
)
def test_more_passes_take_a_lower_one(n_passes, rate):
    found, reason = chosen({2e-3: 2.0, 4e-3: 1.0, 8e-3: 2.0}, 8, n_passes)
    assert found == rate
    assert reason.startswith("the lowest loss after 8 steps is foreseen at 0.004")
    assert ("root of" in reason) == (n_passes > 1)


@pytest.mark.parametrize(
    ("losses", "rate"),
    [
        ({2e-3: 2.0, 4e-3: 1.0, 8e-3: 1.5}, 4.5e-3),  # 4e-3 * 2 ** (1/6)
        ({1e-3: 2.0, 2e-3: 1.0, 4e-3: 1.0, 8e-3: 2.0}, 2.8e-3),  # between both
        ({2e-3: 2.0, 4e-3: 1.0, 8e-3: NEVER}, 2.8e-3),
        ({4e-3: 1.0, 8e-3: 2.0, 1.6e-2: 3.0}, 4e-3),  # the last trial was the lowest
    ],
)
def test_between_the_tried_rates_the_loss_is_a_parabola(losses, rate):
    found, reason = chosen(losses, 8, 1)
    assert found == rate
    assert ("the end of what was tried" in reason) == (min(losses) == rate)


@pytest.mark.parametrize("bottom", [-0.4, 0.0, 0.3])
def test_the_bottom_of_a_parabola_is_found(bottom):
    assert offset(*((x - bottom) ** 2 + 7 for x in (-1, 0, 1))) == pytest.approx(bottom)


def test_losses_that_are_all_alike_leave_the_rate():
    assert offset(1.0, 1.0, 1.0) == 0


def test_where_every_rate_diverges_the_run_fails():
    with pytest.raises(RunFailedError, match=r"every learning rate from 0\.25 to 1 diverges"):
        chosen({1: NEVER, 0.5: NEVER, 0.25: NEVER}, 8, 1)


def _spec(method="lora", **train):
    train = {"batch_size": 2, "epochs": 40} | train
    adapter = AdapterSpec(method=method, rank=2, alpha=4)
    return RunSpec(adapter=adapter, train=TrainSpec(**train, find_learning_rate=True))


def _choose(model, sequences, spec, layers=(0, 1, 2)):
    schedule = Schedule.of(sequences, spec.train, spec.seed)
    return rate_trial.choose(model, sequences, spec, layers, schedule, Silent()), schedule


@pytest.mark.parametrize("layers", [[0, 1, 2], [1]])
def test_trials_are_ordinary_trainings_and_leave_no_trace(make_model, sequences, layers):
    """Held-out losses of a loop with torch's own AdamW over the plain step, the rate falling."""
    model, spec = make_model("llama"), _spec()
    bits, rng = hashes_of(model), torch.get_rng_state()
    found, schedule = _choose(model, sequences, spec, layers)
    assert hashes_of(model) == bits
    assert torch.equal(torch.get_rng_state(), rng)
    steps = schedule.epoch(0)
    assert found.n_held_out == 2 and len(steps) == 6  # a quarter of them at most: one
    default = 1e-3 if len(layers) == 3 else 1.7e-3
    assert {default, 2 * default} <= {trial.learning_rate for trial in found.trials}
    for trial in found.trials:
        adapted = adapt(model, spec.adapter, layers, seed=spec.seed)
        train_mode(adapted.model)
        step, parameters = PlainStep(adapted.model, sequences), list(adapted.parameters.values())
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
        before = held_out_nats(step, steps[:1], optimizer)
        assert found.loss_before_nats == pytest.approx(before, rel=1e-5)
        for i in range(8):  # no warm-up: 0.05 of 8 steps
            optimizer.param_groups[0]["lr"] = trial.learning_rate * (1 - i / 8)
            update(step, steps[1 + i % 5], optimizer, spec.train.max_grad_norm)
        assert trial.loss_nats == pytest.approx(held_out_nats(step, steps[:1], optimizer), rel=1e-3)
        adapted.model.unload()
    losses = {trial.learning_rate: trial.loss_nats for trial in found.trials}
    is_lower = min(losses.values()) < found.loss_before_nats
    assert found.learning_rate == (chosen(losses, 8, 40)[0] if is_lower else default)


@pytest.mark.parametrize("method", ["lora+", "rslora", "dora"])
def test_other_methods_begin_with_their_own_rate(make_model, sequences, method):
    model, spec = make_model("llama"), _spec(method, epochs=1)
    bits = hashes_of(model)
    found, _ = _choose(model, sequences, spec)
    assert hashes_of(model) == bits
    default = {"lora+": 5e-5, "rslora": 5e-4, "dora": 1e-3}[method]
    rates = [trial.learning_rate for trial in found.trials]
    assert {default, 2 * default} <= set(rates) and rates == sorted(rates)


def test_a_rate_that_diverges_is_not_taken(make_model, sequences, monkeypatch):
    def diverges_above(_model, _sequences, spec, _layers, _schedule, _held_out, at, _told):
        rate = spec.train.rate
        return {n: 2.0 - 100 * rate * (n > 0) if rate < 1.5e-3 else None for n in at}

    monkeypatch.setattr(rate_trial, "train_shortly", diverges_above)
    found, _ = _choose(make_model("llama"), sequences, _spec(epochs=1))
    losses = {trial.learning_rate: trial.loss_nats for trial in found.trials}
    assert losses[2e-3] is None and found.learning_rate < 1e-3
    assert "0.002         diverged" in list(rate_trial.lines(found))


def test_where_no_rate_lowers_the_loss_it_is_the_default(make_model, sequences, monkeypatch):
    def rises(_model, _sequences, spec, _layers, _schedule, _held_out, at, _told):
        return {n: 1.0 + (spec.train.rate if n else 0.0) for n in at}

    monkeypatch.setattr(rate_trial, "train_shortly", rises)
    found, _ = _choose(make_model("llama"), sequences, _spec(epochs=1))
    assert len(found.trials) == MOST_TRIALS
    assert found.learning_rate == 1e-3
    assert found.reason == "the default, for no rate that was tried lowers the loss"


def test_where_rows_are_too_few_to_hold_out_it_is_the_default(make_model, sequences, monkeypatch):
    monkeypatch.setattr(rate_trial, "train_shortly", lambda *_: pytest.fail("it tried"))
    found, _ = _choose(make_model("llama"), sequences, _spec(batch_size=4))  # 3 steps an epoch
    assert (found.learning_rate, found.trials) == (1e-3, [])
    (line,) = rate_trial.lines(found)
    assert line.startswith("learning rate 0.001: the default, for an epoch of 3 steps has too few")


def test_a_training_shorter_than_a_trial_is_tried_at_its_own_length(make_model, sequences):
    found, _ = _choose(make_model("llama"), sequences, _spec(epochs=1, max_steps=3))
    assert found.n_steps == 3


def test_an_error_leaves_no_trace(make_model, sequences, monkeypatch):
    model = make_model("llama")
    bits, names = hashes_of(model), [n for n, _ in model.named_modules()]
    monkeypatch.setattr(short_training, "reports", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        _choose(model, sequences, _spec())
    assert hashes_of(model) == bits
    assert [n for n, _ in model.named_modules()] == names
