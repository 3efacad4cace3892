"""Where two models begin to differ."""

import pytest
import torch
from tests.support.adapters import adapter_spec, attach

from swlora.deploy.first_difference import first_difference

TOKENS = torch.randint(0, 200, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["layers.1.mlp.down_proj", "embed_tokens", "norm"])
def test_the_module_that_was_changed_is_found(make_model, name):
    model, other = make_model("llama"), make_model("llama")
    adapted = attach(model, adapter_spec("lora"), [0, 1], seed=1).eval()  # changes nothing yet
    assert first_difference(adapted, other, TOKENS, 1e-4) is None
    with torch.no_grad():
        other.get_parameter(f"model.{name}.weight").mul_(1.1)
    found = first_difference(adapted, other, TOKENS, 1e-3)
    assert found is not None and found.module == f"model.{name}"
    assert found.relative == pytest.approx(0.1, rel=1e-3)


def test_no_number_is_a_difference(make_model):
    model, other = make_model("gpt2"), make_model("gpt2")
    with torch.no_grad():
        other.transformer.h[2].attn.c_proj.weight[0, 0] = float("nan")
    found = first_difference(model, other, TOKENS, 0.1)
    assert found is not None and found.module == "transformer.h.2.attn.c_proj"
