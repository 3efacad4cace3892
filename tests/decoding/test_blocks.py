"""Blocks computed without the calls between their modules, against transformers."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.support.decoding import EOS, alone
from tests.support.models import MakeModel

from swlora.decoding import blocks
from swlora.decoding.batch import BatchDecoder, DecodeRequest

PROMPT, N_NEW = [5, 6, 7, 8, 9, 10, 11], 24
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}


def said(model: Any, prompts: Sequence[Sequence[int]] = (PROMPT,)) -> list[list[int]]:
    decoder = BatchDecoder(model, eos_token_ids=[EOS], max_slots=4)
    decoder.admit([DecodeRequest(i, prompt, N_NEW) for i, prompt in enumerate(prompts)])
    texts: list[list[int]] = [[] for _ in prompts]
    while decoder.n_requests:
        for event in decoder.step():
            if event.finish_reason != "eos":
                texts[event.request_id].append(event.token_id)
    return texts


@pytest.mark.parametrize("model_type", SHAPES)
def test_blocks_of_the_common_kind_say_what_transformers_says(
    model_type: str, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(model_type, **SHAPES[model_type])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    prompts = [PROMPT, PROMPT[:3]]
    expected = [alone(model, prompt, N_NEW) for prompt in prompts]
    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", None)  # nobody calls it
    assert said(model) == expected[:1]
    assert said(model, prompts) == expected


def test_a_hooked_module_is_called(make_model: MakeModel) -> None:
    model = make_model("llama")
    seen: list[Any] = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: seen.append(1))
    text = said(model)
    assert len(seen) == len(text[0])
    handle.remove()
    assert said(model) == text
    assert len(seen) == len(text[0])


@pytest.mark.parametrize("model_type", ["gemma", "olmo2", "phi3", "gpt2"])
def test_other_blocks_keep_their_own_forward(model_type: str, make_model: MakeModel) -> None:
    model = make_model(model_type)
    assert blocks.block_forwards(model.modules(), {}, {}) == {}
    assert said(model) == [alone(model, PROMPT, N_NEW)]
