"""What recipes do: steps as the training loop's, rates, means, jumps, chosen rows, adapters."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.recipes.adapter import feature_norms, make_adapter, pairs, take_out
from benchmarks.recipes.choice import HELD_OUT_PROMPTS, chosen, without_some
from benchmarks.recipes.course import Clock, Course, HeldOutLoss
from benchmarks.recipes.descent import Descent, rate_at, schedule_of
from benchmarks.recipes.ends import FUTILE_JUMPS, Average, Jumps
from benchmarks.recipes.recipe import METHODS, Recipe
from benchmarks.recipes.rows import Rows, number_within
from benchmarks.recipes.starts import sums_of_shards
from torch import nn

from benchmarks import chat_grammar
from swlora.adapters.methods import adapt, train_mode
from swlora.config import AdapterSpec, TrainSpec
from swlora.data.token_sequences import TokenSequences
from swlora.errors import UserError
from swlora.evaluation.loss import dataset_loss, grouped_losses
from swlora.models.anatomy import Anatomy, weight_out_in
from swlora.progress import Silent
from swlora.training.loop import reports
from swlora.training.schedule import learning_rate
from swlora.training.step import TreeStep

N_PROMPTS, N_REFERENCES = 20, 3


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Twenty prompts with three rows each."""
    made = [
        ([256, 10 + p, 40 + p % 7], [90 + p % 5, 100 + r, 257])
        for p in range(N_PROMPTS)
        for r in range(N_REFERENCES)
    ]
    return Rows(TokenSequences.from_lists(made), np.repeat(np.arange(N_PROMPTS), N_REFERENCES))


@pytest.fixture
def model(make_model: Callable[..., Any]) -> Any:
    return make_model("llama")


def course(model: Any, rows: Rows, text: str) -> tuple[dict[str, Any], Any]:
    recipe = Recipe.parse(text)
    rows, held_out = without_some(rows, 0) if recipe.jump else (rows, None)
    adapted = make_adapter(model, recipe, rows, seed=0)
    return Course(recipe, rows, held_out, adapted, Clock()).run(0, rows, n_points=2), adapted


def test_a_plain_recipe_is_the_training_loop(make_model: Callable[..., Any], rows: Rows) -> None:
    _, found = course(make_model("llama"), rows, "steps=6 batch=8 order=pairs rate=0.01")
    spec = TrainSpec(batch_size=8, max_steps=6, learning_rate=0.01, order="pairs")
    expected = adapt(make_model("llama"), AdapterSpec(rank=4, alpha=32), [0, 1, 2], seed=0)
    train_mode(expected.model)
    schedule = schedule_of(rows.sequences, Recipe(steps=6, batch=8, order="pairs"), 0)
    schedule.spec = spec
    assert len(list(reports(TreeStep(expected.model, rows.sequences), schedule, expected))) == 6
    for name, parameter in expected.parameters.items():
        assert torch.equal(found.parameters[name], parameter), name


@pytest.mark.parametrize(
    "text",
    [
        "optimizer=scaled-adamw beta2=0.95 b_alone=2",
        "optimizer=lora-rite rate=1e-3 b_alone=1",
        "optimizer=lora-muon rate=0.05 average=0.5",
        "method=miss rank=3 rate=1e-3",
        "method=lora+ rate=1e-3",
        "method=dora rate=4e-3",
        "method=pissa rate=1e-3",
        "method=full rate=1e-3",
        "method=adalora rate=0.1",
        "method=supertuning rate=0.05",
        "rank=8 scale=16/sqrt(r) targets=plop:2 layers=last:2 schedule=sqrt:0.5",
        "gradient_start=0.5 rank=2 jump=2 rate=1e-3",
    ],
)
def test_every_kind_of_recipe_lowers_the_loss(model: Any, rows: Rows, text: str) -> None:
    before = dataset_loss(model, rows.sequences, Silent()).nats_per_token
    found, adapted = course(model, rows, f"steps=12 batch=8 {text}")
    assert "error" not in found
    assert [point["step"] for point in found["curve"]] == [6, 12]
    assert found["curve"][-1]["nll"] < before - 0.1
    after = dataset_loss(adapted.model.eval(), rows.sequences, Silent()).nats_per_token
    if "jump" not in text:  # else some rows are held out
        assert after == pytest.approx(found["curve"][-1]["nll"], rel=1e-5)
    assert found["rows"] >= 60 and found["nodes"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_the_next_recipe_finds_the_model_as_it_was(model: Any, rows: Rows, method: str) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found, adapted = course(model, rows, f"steps=6 batch=8 method={method}")
    assert "error" not in found
    adapted.finish()
    take_out(adapted)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_lora_plus_moves_b_sixteen_times_as_fast(model: Any, rows: Rows) -> None:
    recipe = Recipe.parse("steps=2 batch=8 method=lora+")
    adapted = make_adapter(model, recipe, rows, seed=0)
    train_mode(adapted.model)
    descent = Descent.of(TreeStep(adapted.model, rows.sequences), adapted, recipe)
    before = [(a.detach().clone(), b.detach().clone()) for a, b in pairs(adapted)]
    for step in schedule_of(rows.sequences, recipe, 0).steps():
        descent.step(step, 1e-3)
    of_a, of_b = 0.0, 0.0
    for now, then in zip(pairs(adapted), before, strict=True):
        of_a = max(of_a, float((now[0].detach() - then[0]).abs().max()))
        of_b = max(of_b, float((now[1].detach() - then[1]).abs().max()))
    assert of_b > 10 * of_a  # AdamW's first steps are about as long as the rate


def test_what_is_not_finite_ends_a_training_with_a_reason(model: Any, rows: Rows) -> None:
    found, _ = course(model, rows, "steps=9 batch=8 rate=1e30 warmup=0")
    assert "not finite" in found["error"] and found["cpu_s"] > 0


def test_b_alone_leaves_every_a(model: Any, rows: Rows) -> None:
    recipe = Recipe.parse("steps=4 batch=8 b_alone=2")
    adapted = make_adapter(model, recipe, rows, seed=0)
    train_mode(adapted.model)
    before = [a.detach().clone() for a, _ in pairs(adapted)]
    descent = Descent.of(TreeStep(adapted.model, rows.sequences), adapted, recipe)
    for number, step in enumerate(schedule_of(rows.sequences, recipe, 0).steps(), start=1):
        descent.step(step, 0.01)
        is_same = all(
            torch.equal(a, old) for (a, _), old in zip(pairs(adapted), before, strict=True)
        )
        assert is_same == (number <= 2)
    assert all(b.norm() > 0 for _, b in pairs(adapted))


def test_the_rate_follows_the_schedule() -> None:
    recipe = Recipe.parse("steps=10 rate=0.1 warmup=0.2 schedule=sqrt:0.5")
    rates = [rate_at(recipe, step) for step in range(10)]
    assert rates[:6] == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.1, 0.1])
    assert rates[6:] == pytest.approx([0.1 * (1 - math.sqrt(k / 5)) for k in (1, 2, 3, 4)])
    for name in ("linear", "cosine", "constant"):
        spec = TrainSpec(learning_rate=0.1, warmup_fraction=0.2, schedule=name)
        recipe = Recipe.parse(f"steps=10 rate=0.1 warmup=0.2 schedule={name}")
        assert rate_at(recipe, 7) == learning_rate(spec, 7, 10)


def test_a_mean_is_applied_for_a_while_or_for_good() -> None:
    weight = nn.Parameter(torch.zeros(3))
    average = Average([weight])
    with average.applied():
        assert weight.eq(0).all()  # nothing to average yet
    for value in (1.0, 2.0, 6.0):
        weight.data.fill_(value)
        average.add()
    with average.applied():
        assert weight.eq(3).all()
    assert weight.eq(6).all()
    average.apply()
    assert weight.eq(3).all()


def test_a_jump_repeats_the_step_while_the_loss_falls() -> None:
    weight = nn.Parameter(torch.tensor([0.0]))
    jumps = Jumps([weight], lambda: float((weight - 5.2).abs()))
    jumps.before_step()
    weight.data += 1
    jumps.after_step()
    assert weight.item() == 5.0 and jumps.repeats == [4]
    for n in range(FUTILE_JUMPS):
        assert not jumps.is_over
        jumps.before_step()
        weight.data += 1
        jumps.after_step()
        assert weight.item() == 6.0 + n  # the step itself stays
    assert jumps.is_over


def test_the_loss_on_the_way_is_that_of_the_data_set(model: Any, rows: Rows) -> None:
    adapted = adapt(model, AdapterSpec(rank=2), [0, 1, 2], seed=0)
    for _, b in pairs(adapted):
        nn.init.normal_(b, std=0.02)
    loss = HeldOutLoss(TreeStep(adapted.model, rows.sequences), rows)
    expected = dataset_loss(adapted.model.eval(), rows.sequences, Silent()).nats_per_token
    assert loss() == pytest.approx(expected, rel=1e-6)
    for _, b in pairs(adapted):
        b.data.zero_()
    assert loss() == pytest.approx(dataset_loss(model, rows.sequences, Silent()).nats_per_token)


@pytest.mark.parametrize("choice", ["random", "hard", "easy", "middle", "diverse"])
def test_rows_are_chosen_two_of_a_prompt_at_a_time(model: Any, rows: Rows, choice: str) -> None:
    found = chosen(rows, 16, choice, model, seed=0)
    again = chosen(rows, 16, choice, model, seed=0)
    assert np.array_equal(found.sequences.tokens, again.sequences.tokens)
    assert 16 <= len(found) <= 17
    sizes = np.bincount(found.prompt_of)
    assert set(sizes) <= {1, 2, 3} and sizes.max() >= 2
    if choice == "diverse":
        assert len(sizes) >= 8


def test_hard_rows_have_a_higher_loss_than_easy_ones(model: Any, rows: Rows) -> None:
    nll = {
        choice: dataset_loss(model, chosen(rows, 16, choice, model, 0).sequences, Silent())
        for choice in ("hard", "middle", "easy")
    }
    hard, middle, easy = (nll[c].nats_per_token for c in ("hard", "middle", "easy"))
    assert hard > middle > easy


def test_diverse_prompts_differ_more_than_random_ones(model: Any) -> None:
    """Of ninety prompts alike and ten unlike all others, the ten are among the first eleven."""
    prompts = [[256, 10, 11, 12, 20 + p % 2] for p in range(90)]
    prompts += [[30 + 3 * p, 31 + 3 * p, 32 + 3 * p] for p in range(10)]
    sequences = TokenSequences.from_lists([(p, [90, 257]) for p in prompts for _ in range(2)])
    found = chosen(Rows(sequences, np.repeat(np.arange(100), 2)), 22, "diverse", model, seed=1)
    starts = found.sequences.tokens[found.sequences.offsets[:-1]]
    assert len(found) == 22 and sum(starts != 256) == 20


def test_what_jumps_are_measured_on_is_not_trained(rows: Rows) -> None:
    train, held_out = without_some(rows, 0)
    assert len(held_out) == 2 * HELD_OUT_PROMPTS and len(train) == len(rows) - 3 * HELD_OUT_PROMPTS

    def prompts(of: Rows) -> set[int]:
        return {int(of.sequences.tokens[start + 1]) for start in of.sequences.offsets[:-1]}

    assert not prompts(train) & prompts(held_out)
    with pytest.raises(UserError, match="jump holds out"):
        without_some(rows.first_prompts(HELD_OUT_PROMPTS), 0)
    with pytest.raises(UserError, match="rows=61 are wanted"):
        chosen(rows, 61, "random", None, 0)


def test_rows_know_their_prompts(rows: Rows) -> None:
    assert number_within(np.array([2, 0, 2, 2, 0])).tolist() == [0, 0, 1, 2, 1]
    few = rows.first_prompts(4).first_of_each(2)
    assert few.prompt_of.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert rows.subset(np.array([0, 58, 59])).prompt_of.tolist() == [0, 1, 1]


@pytest.mark.parametrize(("rank", "n_in"), [(4, 12), (5, 12)])
def test_miss_is_lora_with_a_fixed_a(rank: int, n_in: int) -> None:
    from peft import MissConfig, get_peft_model

    x = torch.randn(3, 2, n_in)
    miss = get_peft_model(
        nn.Sequential(nn.Linear(n_in, 7)), MissConfig(r=rank, target_modules=["0"])
    )
    block = miss.base_model.model[0].miss_block["default"]
    nn.init.normal_(block)
    change = x @ sums_of_shards(rank, n_in).T @ block
    plain = miss.base_model.model[0].base_layer(x)
    assert torch.allclose(miss(x), plain + change, atol=1e-5)


def test_miss_trains_b_alone(model: Any, rows: Rows) -> None:
    adapted = make_adapter(model, Recipe.parse("steps=1 method=miss rank=4"), rows, seed=0)
    assert adapted.parameters and all(".lora_B." in name for name in adapted.parameters)
    assert pairs(adapted) == []
    assert all(not a.requires_grad for n, a in adapted.model.named_parameters() if ".lora_A." in n)


def test_feature_norms_are_those_of_every_row_alone(model: Any) -> None:
    """Rows without a common prefix: the nodes of their tree are their tokens but the last."""
    lists = [([256 - i, 5 + i, 6], [9 + i, 12, 257]) for i in range(4)]
    sequences = TokenSequences.from_lists(lists)
    found = feature_norms(model, sequences, [np.arange(4)])
    seen: dict[str, list[torch.Tensor]] = {}
    for projection in Anatomy(model).all_projections():
        weight = weight_out_in(projection.module)

        def look(_m: Any, x: Any, _y: Any, name: str = projection.name, w: Any = weight) -> None:
            (x,) = x
            plain = (x @ w.T).norm(dim=-1) / (w.norm() * x.norm(dim=-1) / w.shape[1] ** 0.5)
            seen.setdefault(name, []).append(plain.mean())

        projection.module.register_forward_hook(look)
    for prompt, completion in lists:
        model(torch.tensor([prompt + completion[:-1]]))
    assert found == pytest.approx(
        {n: float(torch.stack(v).mean()) for n, v in seen.items()}, rel=1e-4
    )
    assert all(len(p.module._forward_hooks) == 1 for p in Anatomy(model).all_projections())


def test_placements_name_projections(model: Any, rows: Rows) -> None:
    from benchmarks.recipes.adapter import targets

    norms = feature_norms(model, rows.sequences, [np.arange(0, 60, 3)])
    assert targets(model, "all", rows.sequences) == ["all-linear"]
    assert targets(model, "attention", rows.sequences)[-1] == "self_attn.o_proj"
    assert targets(model, "mlp", rows.sequences)[0] == "mlp.gate_proj"
    assert targets(model, "q_proj,v_proj", rows.sequences) == ["q_proj", "v_proj"]
    assert len(set(targets(model, "plop:3", rows.sequences)) & set(norms)) == 3


def test_chats_follow_from_their_system_prompts() -> None:
    by_split = {split: chat_grammar.examples(split) for split in chat_grammar.SIZES}
    assert by_split["dev"] == chat_grammar.examples("dev")
    systems = {s: {e.messages[0].content for e in made} for s, made in by_split.items()}
    assert not systems["train"] & (systems["dev"] | systems["test"])
    for example in by_split["dev"]:
        system, _, answer = (message.content for message in example.messages)
        numbers = {word for word in answer.replace(".00", "").split() if word.strip(".,").isdigit()}
        assert all(number.strip(".,") in system for number in numbers)
        assert "{" not in answer
    assert len(by_split["dev"]) == 3 * len({e.prompt_key for e in by_split["dev"]}) == 180


def test_chats_are_held_out_by_their_prompts(model: Any, rows: Rows) -> None:
    """The loss by prompt, which the tables are made of, adds up to that of all rows."""
    losses = grouped_losses(model, rows.sequences, rows.prompt_of, Silent())
    whole = dataset_loss(model, rows.sequences, Silent())
    assert len(losses) == N_PROMPTS
    assert sum(loss.sum_nats for loss in losses) == pytest.approx(whole.sum_nats, rel=1e-5)
