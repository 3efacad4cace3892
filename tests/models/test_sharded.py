"""A sharded model, as far as one process can tell: what is refused, and which rows are whose."""

from types import SimpleNamespace

import pytest
import torch

from swlora.config import ModelSpec, load_spec
from swlora.errors import UserError
from swlora.models.sharded import load_sharded_model
from swlora.models.sharded_weight import own_rows
from swlora.models.weight_source import SafetensorsWeights


def test_a_single_process_has_nothing_to_share(model_folder):
    with pytest.raises(UserError, match=r"--shard .* single one: start torchrun .* --no-shard"):
        load_sharded_model(ModelSpec(name=str(model_folder("llama"))))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"adapter.method": "pissa"}, "--method pissa needs whole weights; with --shard, use lora"),
        ({"adapter.method": "full"}, "--method full needs whole weights"),
        ({"adapter.method": "dora"}, "--method dora needs whole weights"),
        ({"adapter.method": "supertuning"}, "--method supertuning needs whole weights"),
        ({"adapter.layers": "super"}, "--layers super looks for layers with the whole model"),
        ({"adapter.layers": "auto:0.5"}, "--layers auto:0.5 looks for layers"),
        ({"train.engine": "plain"}, "--shard works with --engine tree only"),
    ],
)
def test_what_needs_whole_weights_is_refused(settings, said):
    assert load_spec(None, settings).train.shard is False
    with pytest.raises(UserError) as refused:
        load_spec(None, settings | {"train.shard": True})
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(("n_rows", "size"), [(8, 2), (7, 2), (3, 4), (264, 5), (1, 3)])
def test_rows_are_divided_as_torch_divides_them(n_rows, size):
    weight = torch.arange(2 * n_rows).view(n_rows, 2)
    expected = [*torch.chunk(weight, size), *[weight[:0]] * size][:size]
    for rank in range(size):
        mesh = SimpleNamespace(size=lambda: size, get_local_rank=lambda rank=rank: rank)
        assert torch.equal(weight[own_rows(n_rows, mesh)], expected[rank])


def test_rows_are_read_without_the_others(model_folder):
    weights = SafetensorsWeights(model_folder("gpt2"))
    name = "transformer.h.1.mlp.c_fc.weight"
    assert torch.equal(weights.rows(name, slice(5, 11)), weights.tensor(name)[5:11])
    assert weights.rows(name, slice(24, 24)).shape == (0, 40)
