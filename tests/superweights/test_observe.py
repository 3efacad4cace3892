"""Observation: what experts put into the residual stream, and hooks that always go."""

from collections import defaultdict

import pytest
import torch
from torch import nn

from swlora.models.anatomy import Anatomy, weight_out_in
from swlora.superweights.observe import followed, observed

PROMPT = "Apple Inc. is a worldwide tech company."


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe", "qwen3_moe"])
def test_experts_are_seen_as_they_enter_the_residual_stream(model_type, make_model):
    """Summed over experts, the outputs observed are what the module of the experts returns."""
    anatomy = Anatomy(make_model(model_type))
    returned: dict[int, torch.Tensor] = {}
    for layer in range(3):
        if experts := anatomy.experts(layer):
            experts.register_forward_hook(
                lambda _m, _x, y, layer=layer: returned.update({layer: y})
            )
    seen = []
    tokens = torch.tensor([list(PROMPT.encode()), list(PROMPT.upper().encode())])
    with torch.inference_mode(), observed(anatomy, seen.append):
        anatomy.backbone(input_ids=tokens)
    sums = {layer: torch.zeros_like(y) for layer, y in returned.items()}
    n_seen = defaultdict(int)
    for o in (o for o in seen if o.group != o.name):
        weight = weight_out_in(anatomy.projection(o.layer, o.name))
        torch.testing.assert_close(o.y, o.x @ weight.T)
        if anatomy.family.feeds_residual(o.name):
            sums[o.layer][list(o.positions)] += o.y
            n_seen[o.layer] += len(o.positions)
    assert sums.keys() == returned.keys() and len(sums) == (2 if model_type == "qwen3_moe" else 3)
    for layer, y in returned.items():
        torch.testing.assert_close(sums[layer], y)
        assert n_seen[layer] == tokens.numel() * 2  # two experts a token


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_hooks_go_when_a_hook_fails(model_type, error, make_model):
    model = make_model(model_type)
    anatomy = Anatomy(model)

    def fail(observation: object) -> None:
        if observation.layer == 1:
            raise error

    with pytest.raises(error), observed(anatomy, fail):
        anatomy.backbone(input_ids=torch.tensor([[1, 2, 3]]))
    assert n_hooks(model) == 0


def test_hooks_go_when_the_body_fails(make_model):
    model = make_model("llama")
    with pytest.raises(KeyboardInterrupt), observed(Anatomy(model), lambda *_: None):
        assert n_hooks(model) == 21
        raise KeyboardInterrupt
    assert n_hooks(model) == 0


def test_followers_go_when_the_body_fails(make_model):
    model = make_model("gpt2")
    with pytest.raises(KeyboardInterrupt), followed(Anatomy(model)):
        assert n_hooks(model) == 4
        raise KeyboardInterrupt
    assert n_hooks(model) == 0
