"""What `auto` measures on a model: gradients, times and short trainings, and what it leaves."""

import pytest
import torch
from tests.support.plain_training import hashes_of, held_out_nats, update

from swlora.adapters.methods import adapt, train_mode
from swlora.config import AdapterSpec, RunSpec, TrainSpec
from swlora.config.rates import DEFAULT_RATE, RATES
from swlora.data.token_sequences import TokenSequences
from swlora.loss_sum import LossSum
from swlora.progress import Silent
from swlora.training import layer_choice, layer_trial, short_training
from swlora.training.layer_profile import LayerProfile, profile
from swlora.training.layer_trial import plan_trial, try_layers
from swlora.training.plain import PlainStep
from swlora.training.schedule import Schedule, step_plan

pytestmark = pytest.mark.usefixtures("short_trials")


def _spec(*, epochs=40, batch_size=2, **adapter):
    train = TrainSpec(batch_size=batch_size, epochs=epochs, learning_rate=0.02)
    return RunSpec(adapter=AdapterSpec(**{"rank": 2, "alpha": 4, **adapter}), train=train)


def _plan(sequences, spec, budget=0.5):
    return plan_trial(Schedule.of(sequences, spec.train, spec.seed), sequences, budget)


def test_gradient_norms_are_those_of_the_plain_step(make_model, sequences):
    model = make_model("llama")
    n_layers = model.config.num_hidden_layers
    spec = _spec(batch_size=6)
    steps = step_plan(sequences, spec.train, spec.seed)(0)
    before, names = hashes_of(model), [n for n, _ in model.named_modules()]
    found = profile(model, sequences, spec, steps, print)
    assert hashes_of(model) == before
    assert [n for n, _ in model.named_modules()] == names, "adapters were left in the model"
    assert min(found.head_s, found.frozen_block_s, found.trained_block_s) > 0
    assert found.is_cached

    adapted = adapt(model, spec.adapter, range(n_layers), seed=spec.seed)
    train_mode(adapted.model)
    step = PlainStep(adapted.model, sequences)
    n_tokens = sum(step(groups).n_tokens for groups in steps)
    for layer in range(n_layers):
        gradients = [p.grad for n, p in adapted.parameters.items() if f".layers.{layer}." in n]
        expected = sum(float(g.abs().sum()) for g in gradients if g is not None) / n_tokens
        assert found.gradient_norms[layer] == pytest.approx(expected, rel=1e-4)


def test_states_count_as_kept_only_where_a_cache_will_hold_them(make_model, sequences):
    spec = _spec()
    steps = step_plan(sequences, spec.train, spec.seed)(0)[:1]
    for change in ({"cache_gb": 0.0}, {"cache_gb": 1e-9}, {"engine": "plain"}):
        changed = spec.model_copy(update={"train": spec.train.model_copy(update=change)})
        assert not profile(make_model("llama"), sequences, changed, steps, print).is_cached


def test_what_is_held_out_is_not_trained_on(sequences):
    plan = _plan(sequences, _spec())
    trained, held_out = (
        {int(i) for groups in steps for ids in groups for i in ids}
        for steps in (plan.trained, plan.held_out)
    )
    assert trained and held_out
    assert not trained & held_out
    assert len(trained | held_out) == len(sequences)


def test_measuring_must_be_worth_its_time(sequences):
    """7 steps to profile, 3 times 8 to try, 3 for the losses: 34, and so 68 must be saved."""
    assert "choosing layers takes that of about 34" in _plan(sequences, _spec(epochs=22)).objection
    assert _plan(sequences, _spec(epochs=23)).objection is None  # saves 69 of 138 steps
    few = _plan(sequences, _spec(epochs=400, batch_size=6))
    assert few.objection == "an epoch of 2 steps has too few rows to hold some out"


def test_small_steps_are_tried_for_longer(sequences, monkeypatch):
    monkeypatch.setattr(layer_trial, "TRIAL_EXAMPLES", 256)
    monkeypatch.setattr(layer_trial, "PROFILED_EXAMPLES", 96)
    plan = _plan(sequences, _spec(epochs=1))
    assert (plan.n_trial, plan.n_profiled) == (128, 48)  # of 2 examples


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_a_trial_is_an_ordinary_training_and_leaves_no_trace(make_model, sequences, method):
    """Held-out losses of a loop with torch's own AdamW over the plain step."""
    model = make_model("llama")
    adapter = AdapterSpec(method="full") if method == "full" else _spec(method=method).adapter
    spec = _spec().model_copy(update={"adapter": adapter})
    if method == "full":  # 0.02 is to LoRA what 0.001 is to it
        rate = {"learning_rate": 0.02 * RATES["full"] / DEFAULT_RATE}
        spec = spec.model_copy(update={"train": spec.train.model_copy(update=rate)})
    plan, bits, rng = _plan(sequences, spec), hashes_of(model), torch.get_rng_state()
    n_steps = plan.n_trial + 3
    told = []
    losses = try_layers(
        model, sequences, spec, [1, 2], plan, n_steps=n_steps, advance=lambda: told.append(1)
    )
    assert len(told) == n_steps
    assert hashes_of(model) == bits
    assert torch.equal(torch.get_rng_state(), rng)

    used = "lora" if method == "full" else method
    adapted = adapt(model, adapter.model_copy(update={"method": used}), [1, 2], seed=spec.seed)
    step = PlainStep(adapted.model, sequences)
    parameters = list(adapted.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0)
    held_out = plan.held_out
    assert losses.before_nats == pytest.approx(held_out_nats(step, held_out, optimizer), rel=1e-5)
    for i in range(n_steps):
        if i == plan.n_trial:
            assert losses.early_nats == pytest.approx(
                held_out_nats(step, held_out, optimizer), rel=1e-3
            )
        update(step, plan.trained[i % len(plan.trained)], optimizer, spec.train.max_grad_norm)
    assert losses.last_nats == pytest.approx(held_out_nats(step, held_out, optimizer), rel=1e-3)
    assert losses.last_nats != pytest.approx(losses.early_nats, rel=1e-3)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(("layers", "rate"), [([2], 1.7e-3), ([0, 1, 2], 1e-3)])
def test_a_rate_that_is_left_open_is_that_of_as_many_layers(
    make_model, sequences, method, layers, rate
):
    """Of LoRA, which stands for full training."""

    def losses(learning_rate, method):
        spec = RunSpec(
            adapter=AdapterSpec(method=method),
            train=TrainSpec(batch_size=2, epochs=40, learning_rate=learning_rate),
        )
        plan, model = _plan(sequences, spec), make_model("llama")
        return try_layers(model, sequences, spec, layers, plan, n_steps=9, advance=lambda: None)

    assert losses(None, method) == losses(rate, "lora")
    assert losses(None, method) != losses(2 * rate, "lora")


def test_a_trial_that_diverges_has_no_loss_and_leaves_no_trace(make_model, sequences, monkeypatch):
    model, spec = make_model("llama"), _spec()
    bits = hashes_of(model)
    step_of = short_training.TreeStep.__call__

    def diverged(self, groups) -> LossSum:
        return LossSum(float("nan"), step_of(self, groups).n_tokens)

    monkeypatch.setattr(short_training.TreeStep, "__call__", diverged)
    losses = try_layers(
        model, sequences, spec, [2], _plan(sequences, spec), n_steps=9, advance=lambda: None
    )
    assert losses.before_nats > 0
    assert (losses.early_nats, losses.last_nats) == (None, None)
    assert hashes_of(model) == bits


def test_an_error_leaves_no_trace(make_model, sequences):
    model, spec = make_model("llama"), _spec()
    bits, names = hashes_of(model), [n for n, _ in model.named_modules()]
    with pytest.raises(ZeroDivisionError):
        try_layers(
            model, sequences, spec, [2], _plan(sequences, spec), n_steps=9, advance=lambda: 1 // 0
        )
    assert hashes_of(model) == bits
    assert [n for n, _ in model.named_modules()] == names


@pytest.mark.parametrize("top_learns", [False, True])
def test_where_only_the_top_layer_is_affordable_it_has_to_do_no_worse_than_all(
    make_model, monkeypatch, top_learns
):
    """The times are given: 51 an example with all layers, 11.3 with the last; losses are real.

    A last layer that hands its input through learns next to nothing.
    """
    torch.manual_seed(0)
    prompts = [torch.randint(20, 200, (4,)).tolist() for _ in range(12)]
    sequences = TokenSequences.from_lists([(p, [3, 5, 4, 9, 257]) for p in prompts])
    model, all_layers = make_model("llama", num_hidden_layers=5), [0, 1, 2, 3, 4]
    if not top_learns:
        top = model.model.layers[4]
        for projection in (top.self_attn.o_proj, top.mlp.down_proj, top.self_attn.v_proj):
            projection.weight.zero_()
    bits = hashes_of(model)
    found = LayerProfile([1.0, 1.0, 1.0, 1.0, 0.001], 1.0, 0.075, 10.0, is_cached=False)
    monkeypatch.setattr(layer_choice, "profile", lambda *_: found)
    spec = _spec(epochs=60, targets=["v_proj"] if not top_learns else ["all-linear"])
    choice = layer_choice.choose(model, sequences, spec, 0.4, Silent())
    assert hashes_of(model) == bits
    assert [t.layers for t in choice.trials] == [all_layers, [4], [2]]
    everything, last, _ = choice.trials
    assert everything.loss_nats < choice.loss_before_nats - 0.5
    assert choice.layers == ([4] if last.loss_nats <= everything.loss_nats else all_layers)
    if not top_learns:
        assert last.loss_nats > choice.loss_before_nats - 0.01
        assert choice.layers == all_layers
