"""The engine on a CUDA device: flex_attention follows the same closed form as the CPU's runs."""

from typing import Any

import numpy as np
import pytest
import torch
from tests.support.adapters import attach
from transformers import AutoConfig, AutoModelForCausalLM

from swlora.adapters.methods import trainable_parameters
from swlora.config import AdapterSpec
from swlora.data.token_sequences import TokenSequences
from swlora.training.plain import PlainStep
from swlora.training.step import TreeStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 128, "n_layer": 3, "n_head": 4},
    "llama": {
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 160,
    },
    "mistral": {
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "intermediate_size": 160,
        "sliding_window": 9,
        "head_dim": 32,
    },
}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_tree_step_equals_plain_step_on_cuda(model_type: str) -> None:
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(12):
        prompt = rng.integers(1, 20, rng.integers(2, 30)).tolist()
        for _ in range(rng.integers(1, 6)):
            pairs.append((prompt, [*rng.integers(1, 6, rng.integers(0, 20)).tolist(), 0]))
    sequences = TokenSequences.from_lists(pairs)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=320, **CONFIGS[model_type])
    model = AutoModelForCausalLM.from_config(config).eval().cuda()
    peft_model = attach(model, AdapterSpec(rank=4, alpha=8), [1, 2], seed=1)
    parameters = trainable_parameters(peft_model)
    for parameter in parameters.values():
        torch.nn.init.normal_(parameter, std=0.05)
    ids = np.arange(len(sequences))

    plain = PlainStep(peft_model, sequences)([ids])
    expected = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    peft_model.zero_grad()
    tree = TreeStep(peft_model, sequences)([ids[:20], ids[20:]])

    assert tree.n_tokens == plain.n_tokens
    assert tree.sum_nats == pytest.approx(plain.sum_nats, rel=1e-5)
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < 1e-4, name  # sums run in another order on another kernel
