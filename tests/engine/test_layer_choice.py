"""`auto:BUDGET`: what is measured of a model, and what is chosen from it."""

import hashlib

import pytest
import torch

from swlora.adapters.methods import adapt, train_mode
from swlora.config import AdapterSpec, RunSpec, TrainSpec
from swlora.data.token_sequences import TokenSequences
from swlora.engine.layer_choice import LayerProfile, choose, profile, table
from swlora.engine.plain import PlainStep
from swlora.engine.schedule import step_plan
from swlora.errors import RunFailedError, UserError

N_LAYERS = 6


def _profile(norms, *, head=6.0, frozen=0.3, trained=1.0):
    return LayerProfile(list(norms), head, frozen, trained)


def _time_by_hand(found, lowest, passes):
    n = len(found.gradient_norms)
    one = (n - lowest) * found.trained_block_s + found.head_s
    return lowest * found.frozen_block_s + one * max(1.0, passes)


@pytest.mark.parametrize("norms", [[1.0] * 6, [1, 2, 3, 4, 5, 60], [50, 1, 1, 1, 1, 1.0]])
@pytest.mark.parametrize("budget", [0.4, 0.7, 1.0])
@pytest.mark.parametrize("n_epochs", [1, 5])
def test_the_least_time_within_the_budget_is_taken(norms, budget, n_epochs):
    found = _profile(norms, head=1.0)
    in_budget = {
        lowest: _time_by_hand(found, lowest, sum(norms) / sum(norms[lowest:]))
        for lowest in range(6)
        if _time_by_hand(found, lowest, n_epochs) <= budget * _time_by_hand(found, 0, n_epochs)
    }
    if not in_budget:
        with pytest.raises(UserError, match="larger budget or more epochs"):
            choose(found, n_epochs=n_epochs, budget=budget)
        return
    choice = choose(found, n_epochs=n_epochs, budget=budget)
    best = min(in_budget, key=in_budget.__getitem__)
    assert choice.layers == list(range(best, 6))
    assert choice.taken.time_to_quality_s == pytest.approx(in_budget[best])
    assert [option.lowest for option in choice.options] == list(range(6))


def test_cached_epochs_make_high_layers_affordable():
    found = _profile([1.0] * 10, head=1.0)
    with pytest.raises(UserError, match=r"takes 0\.\d\d of the time"):
        choose(found, n_epochs=1, budget=0.3)
    few, many = (choose(found, n_epochs=n, budget=0.5).layers for n in (2, 20))
    assert len(few) < len(many)


def test_the_table_marks_what_was_taken():
    choice = choose(_profile([1.0] * 30), n_epochs=3, budget=0.5)
    marked = [line for line in table(choice) if "taken" in line]
    assert len(marked) == 1
    assert marked[0].startswith(f"{choice.taken.lowest}-29")
    assert len(table(choice)) <= 14


def test_a_model_without_gradient_is_refused():
    with pytest.raises(RunFailedError, match="no gradient"):
        choose(_profile([0.0] * 4), n_epochs=1, budget=1.0)


@pytest.fixture
def sequences():
    torch.manual_seed(3)
    prompts = [torch.randint(3, 40, (n,)).tolist() for n in (4, 4, 7, 2)]
    return TokenSequences.from_lists(
        [(p, torch.randint(3, 40, (5 + i,)).tolist()) for i, p in enumerate(prompts * 3)]
    )


def _weights(model):
    return {n: hashlib.sha256(p.numpy(force=True)).hexdigest() for n, p in model.named_parameters()}


def test_gradient_norms_are_those_of_the_plain_step(make_model, sequences):
    model = make_model("llama")
    n_layers = model.config.num_hidden_layers
    spec = RunSpec(adapter=AdapterSpec(rank=2, alpha=4), train=TrainSpec(batch_size=6))
    before, names = _weights(model), [n for n, _ in model.named_modules()]
    found = profile(model, sequences, spec, print)
    assert _weights(model) == before
    assert [n for n, _ in model.named_modules()] == names, "adapters were left in the model"
    assert min(found.head_s, found.frozen_block_s, found.trained_block_s) > 0

    adapted = adapt(model, spec.adapter, range(n_layers), seed=spec.seed)
    train_mode(adapted.model)
    step = PlainStep(adapted.model, sequences)
    n_tokens = sum(step(rows)[1] for rows in step_plan(sequences, spec.train, spec.seed)(0))
    for layer in range(n_layers):
        gradients = [p.grad for n, p in adapted.parameters.items() if f".layers.{layer}." in n]
        expected = sum(float(g.abs().sum()) for g in gradients if g is not None) / n_tokens
        assert found.gradient_norms[layer] == pytest.approx(expected, rel=1e-4)
