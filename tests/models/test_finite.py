"""A model that holds what is no number is named, with the tensor, before anything is computed."""

import math

import pytest
import torch

from swlora.config import ModelSpec
from swlora.errors import UserError
from swlora.models.finite import not_finite
from swlora.models.load import load_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_is_counted(dtype):
    tensors = {
        "whole": torch.full((3, 4), 2.0),
        "large": torch.full((3, 4), 3e38),  # whose sum is infinite, though no number of it is
        "nan": torch.tensor([1.0, math.nan, math.nan]),
        "infinities": torch.tensor([math.inf, -math.inf, 0.0]),
        "ids": torch.arange(3),
    }
    named = [(k, t if k == "ids" else t.to(dtype)) for k, t in tensors.items()]
    assert not_finite(named) == {"nan": 2, "infinities": 2}
    assert not_finite([("shape alone", torch.empty(3, device="meta"))]) == {}


def test_a_model_with_a_nan_in_it_is_refused_by_the_tensors_name(
    make_model, tiny_tokenizer, tmp_path
):
    model = make_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[2, 3] = math.nan
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    expected = r"not finite: 1 in model\.layers\.1\.mlp\.down_proj\.weight"
    with pytest.raises(UserError, match=expected):
        load_model(ModelSpec(name=str(tmp_path), dtype="float32"))
