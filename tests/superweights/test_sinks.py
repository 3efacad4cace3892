"""Attention sinks: as counted over the weights that transformers' eager attention returns."""

from typing import Any

import pytest
import torch
from tests.conftest import TINY
from transformers import AutoConfig, AutoModelForCausalLM

from swlora.errors import RunFailedError
from swlora.models.anatomy import Anatomy
from swlora.superweights.sinks import SINK_SCORE, measure_sinks

WINDOWS = torch.randint(0, 250, (3, 13), generator=torch.Generator().manual_seed(4))


def eager_attentions(model_type: str, model: Any) -> list[torch.Tensor]:
    """The weights (B, H, T, T) of every layer, of a model that was made to attend eagerly."""
    config = AutoConfig.for_model(model_type, **TINY[model_type])
    eager = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        return list(eager(input_ids=WINDOWS, output_attentions=True).attentions)


def steered(model: Any) -> Any:
    """Make attention uneven: as random weights have it, no head is a sink."""
    for p in Anatomy(model).all_projections():
        if p.name in Anatomy(model).family.attention_in:
            p.module.weight.mul_(4)
    return model


@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "gpt_neox", "opt", "falcon", "gemma2", "phi3", "mixtral"]
)
def test_sinks_are_counted_over_eager_attention(model_type, make_model, weights_sha256):
    model = steered(make_model(model_type))
    before, attends_by = weights_sha256(model), model.config._attn_implementation
    sinks = measure_sinks(Anatomy(model), WINDOWS)
    assert (weights_sha256(model), model.config._attn_implementation) == (before, attends_by)
    assert not any(module._forward_hooks for module in model.modules())
    n_sinks = 0
    for layer, weights in enumerate(eager_attentions(model_type, model)):
        n_windows, n_heads, n_queries, _ = weights.shape
        scores = [
            sum(float(weights[w, h, i, 0]) for i in range(n_queries)) / n_queries
            for w in range(n_windows)
            for h in range(n_heads)
        ]
        assert sinks.mass[layer] == pytest.approx(sum(scores) / len(scores), rel=1e-5)
        over = [score > SINK_SCORE for score in scores]
        assert sinks.sink_heads[layer] == pytest.approx(sum(over) / len(over))
        n_sinks += sum(over)
    assert n_sinks, "the comparison of heads shows nothing without any sink"
    assert len(sinks.mass) == len(sinks.sink_heads) == 3


def test_a_sink_is_what_the_paper_calls_one():
    assert SINK_SCORE == 0.3  # arXiv 2410.10781, section 3.2


def test_the_model_attends_as_before_after_an_error(make_model, monkeypatch):
    model = make_model("llama")
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_sinks(Anatomy(model), WINDOWS)
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in model.modules())


def test_attention_that_shows_no_weights_is_named(make_model, monkeypatch):
    model = make_model("llama")
    attention = model.model.layers[2].self_attn
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda **given: (forward(**given)[0], None))
    with pytest.raises(RunFailedError, match="layer 2 shows no attention weights"):
        measure_sinks(Anatomy(model), WINDOWS)
