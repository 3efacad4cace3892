"""tree_loss against `model(...).loss` of transformers and PEFT: the loss and every gradient."""

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tests.kernels.test_rotary import KINDS, LIMIT
from tests.support.adapters import attach, fill_b
from tests.support.collated import (
    IGNORED,
    LAYOUTS,
    Batch,
    assert_same_gradients,
    gradients,
    labelled,
    packed,
    padded,
    plain_loss,
)
from tests.support.models import MakeModel
from tests.support.sequences import branching, deep
from tests.training.test_exactness import SHAPES, adapted

from swlora import tree_loss
from swlora.adapters.methods import trainable_parameters
from swlora.config import AdapterSpec
from swlora.errors import UserError
from swlora.integrations import tree_loss as module

ROWS = labelled(branching())


def assert_same(model: Any, batch: Batch, *, tolerance: float = 1e-5, **more: Any) -> None:
    expected = plain_loss(model, batch, **more)
    found = tree_loss(model, **batch, **more)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=tolerance)
    assert_same_gradients(gradients(model, found), gradients(model, expected), tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_family_and_layout(make_model: MakeModel, shape: str, layout: str) -> None:
    peft_model, batch = adapted(make_model, shape), LAYOUTS[layout](ROWS)
    if (SHAPES[shape][0], layout) == ("opt", "packed"):
        with pytest.raises(UserError, match=r"packed rows, which see each other.*pad them"):
            tree_loss(peft_model, **batch)
    else:
        assert_same(peft_model, batch)


@pytest.mark.parametrize("shape", ["gpt2", "qwen3", "mistral, window 70"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_long_rows(make_model: MakeModel, shape: str, layout: str) -> None:
    assert_same(adapted(make_model, shape), LAYOUTS[layout](labelled(deep())))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe"])
def test_experts(make_model: MakeModel, model_type: str) -> None:
    peft_model = attach(make_model(model_type, initializer_range=0.05), AdapterSpec(rank=3), [1, 2],
                        seed=1)  # fmt: skip
    fill_b(peft_model)
    for layout in ("right", "packed"):
        assert_same(peft_model, LAYOUTS[layout](ROWS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotary_angles_of_the_longest_row(make_model: MakeModel, kind: str, layout: str) -> None:
    """Beyond a limit transformers turns all rows of a batch otherwise, short ones, too."""
    model_type, changes = KINDS[kind]
    shape = {"head_dim": 8, "hidden_size": 32, "initializer_range": 0.05}
    peft_model = attach(make_model(model_type, **shape | changes), AdapterSpec(rank=3), [0, 2],
                        seed=1)  # fmt: skip
    fill_b(peft_model)
    long = list(range(20, 20 + LIMIT + 6))
    assert_same(peft_model, LAYOUTS[layout](ROWS[:6]))
    assert_same(peft_model, LAYOUTS[layout]([*ROWS[:6], (long, [IGNORED, *long[1:]])]))


def test_without_mask_and_with_positions(make_model: MakeModel) -> None:
    for shape in ("gpt2", "qwen3"):
        peft_model = adapted(make_model, shape)
        ids = torch.randint(3, 40, (3, 9), generator=torch.Generator().manual_seed(1))
        ids[1:, :5] = ids[0, :5]
        batch = {"input_ids": ids, "labels": ids.clone()}
        assert_same(peft_model, batch)
        assert_same(peft_model, batch | {"position_ids": torch.arange(9)[None]})
        several = packed(ROWS)["position_ids"] + 3  # collators may begin with other positions
        assert_same(peft_model, packed(ROWS) | {"position_ids": several})
        left = padded(ROWS, "left")
        positions = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
        assert_same(peft_model, left | {"position_ids": positions})


def test_several_packed_rows(model: Any) -> None:
    """Rows of several sequences each, with a padded end that has positions of its own."""
    first, second = packed(ROWS[:5]), packed(ROWS[5:9])
    n = max(first["input_ids"].shape[1], second["input_ids"].shape[1]) + 2

    def joined(name: str, pad: int) -> torch.Tensor:
        parts = [batch[name] for batch in (first, second)]
        return torch.cat([torch.nn.functional.pad(p, (0, n - p.shape[1]), value=pad)
                          for p in parts])  # fmt: skip

    assert_same(model, {
        "input_ids": joined("input_ids", 7),
        "labels": joined("labels", IGNORED),
        "position_ids": joined("position_ids", 0),
    })  # fmt: skip


@pytest.mark.parametrize("n_items", [7, torch.tensor(123)])
def test_num_items_in_batch(model: Any, n_items: Any) -> None:
    assert_same(model, padded(ROWS, "right"), num_items_in_batch=n_items)


def test_a_batch_without_labels_among_others(model: Any) -> None:
    batch = padded(ROWS, "right")
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    loss = tree_loss(model, **batch, num_items_in_batch=5)
    assert float(loss.detach()) == 0
    assert not any(gradient.any() for gradient in gradients(model, loss).values())
    with pytest.raises(UserError, match="no label"):
        tree_loss(model, **batch)
    with pytest.raises(UserError, match="no label"):
        tree_loss(model, **batch, num_items_in_batch=torch.tensor(0))


def test_it_is_a_part_of_a_larger_graph(model: Any) -> None:
    batch = padded(ROWS, "right")
    once = gradients(model, tree_loss(model, **batch))
    parameters = trainable_parameters(model)
    weighted = 3 * tree_loss(model, **batch) + sum(p.square().sum() for p in parameters.values())
    found = gradients(model, weighted)
    expected = {name: 3 * once[name] + 2 * p.detach() for name, p in parameters.items()}
    assert_same_gradients(found, expected)


def test_no_graph_without_gradients(model: Any) -> None:
    batch = packed(ROWS)
    with torch.no_grad():
        loss = tree_loss(model, **batch)
        expected = plain_loss(model, batch)
    assert not loss.requires_grad
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_training_mode_without_dropout(model: Any) -> None:
    assert_same(model.train(), padded(ROWS, "right"))


def test_weights_of_the_blocks_themselves(make_model: MakeModel) -> None:
    """No adapter: two whole matrices and a norm are trained."""
    plain = make_model("llama", initializer_range=0.05)
    for name in ("1.self_attn.q_proj", "2.mlp.down_proj", "2.input_layernorm"):
        plain.get_submodule(f"model.layers.{name}").requires_grad_(True)
    assert_same(plain, padded(ROWS, "left"))


def test_it_follows_the_adapter(model: Any) -> None:
    """A step, another scale, switched off, merged, a second adapter: what is kept is made anew."""
    batch = padded(ROWS, "right")
    assert_same(model, batch)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.mul_(1.5)
    assert_same(model, batch)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    layer.set_scale("default", 3)
    assert_same(model, batch)

    def assert_same_loss() -> float:
        with torch.no_grad():
            loss = float(tree_loss(model, **batch))
            assert loss == pytest.approx(float(plain_loss(model, batch)), rel=1e-5)
        return loss

    with model.disable_adapter():
        off = assert_same_loss()
    assert assert_same_loss() != pytest.approx(off, rel=1e-4)
    model.merge_adapter()
    assert_same_loss()
    model.unmerge_adapter()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter("second")
    fill_b(model)
    assert_same(model, batch)


def test_copies_of_the_model_are_whole(model: Any) -> None:
    batch = padded(ROWS, "right")
    tree_loss(model, **batch)
    assert_same(copy.deepcopy(model), batch)
    assert_same(pickle.loads(pickle.dumps(model)), batch)  # torch.save pickles, too
    assert module._ATTRIBUTE in vars(model.get_base_model())
    module.release(model)
    assert module._ATTRIBUTE not in vars(model.get_base_model())
    assert_same(model, batch)


def test_autocast_of_the_weights_own_dtype(make_model: MakeModel) -> None:
    model = adapted(make_model, "llama, tied head")
    batch = padded(ROWS, "right")
    message = "autocast to bfloat16 is on and the weights are float32"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match=message):
        tree_loss(model, **batch)
    model.get_base_model().to(torch.bfloat16)
    with torch.no_grad():
        alone = tree_loss(model, **batch)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(tree_loss(model, **batch), alone)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.gate_proj", "input_layernorm"])
def test_hooks_in_the_blocks_run(model: Any, name: str) -> None:
    module = model.base_model.model.model.layers[1].get_submodule(name)
    before = float(tree_loss(model, **padded(ROWS, "right")).detach())
    module.register_forward_hook(lambda _m, _x, out: 2 * out)
    assert_same(model, padded(ROWS, "right"))
    assert float(tree_loss(model, **padded(ROWS, "right")).detach()) != pytest.approx(before)
