"""Adapters that other tools made, of more than the blocks' projections: as in plain PEFT.

The oracle is a PeftModel in float32, loaded by PEFT itself, on padded batches and by the plainest
greedy decoding; what is not run is refused by name.
"""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig
from tests.evaluation.test_loss import make_sequences, oracle
from tests.support.adapters import move
from tests.support.models import MakeModel
from tests.support.plain_peft import greedy

from swlora.adapters.reach import is_covered
from swlora.adapters.saved import load_adapter
from swlora.config import DecodeSpec
from swlora.errors import UserError
from swlora.evaluation.decode import generate
from swlora.evaluation.english import english_loss
from swlora.evaluation.loss import grouped_losses
from swlora.loss_sum import LossSum
from swlora.progress import Silent
from swlora.superweights.ablate import text_loss, text_windows

EOS = 257


def lora(**changes: Any) -> LoraConfig:
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**settings | changes)


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TIED = {"tie_word_embeddings": True}
# name: (model type, changes of the model, configuration, whether the fast forwards cover it)
KINDS: dict[str, tuple[str, dict[str, Any], Any, bool]] = {
    "head and embeddings": (
        "llama",
        {},
        lora(target_modules=["q_proj", "embed_tokens", "lm_head"]),
        False,
    ),
    "tied head and embeddings": (
        "llama",
        TIED,
        lora(target_modules=["q_proj", "embed_tokens", "lm_head"]),
        False,
    ),
    "head": ("llama", {}, lora(target_modules=["lm_head"]), False),
    "embeddings of gemma, scaled": ("gemma2", {}, lora(target_modules=["embed_tokens"]), False),
    "gpt2's tokens and positions": ("gpt2", {}, lora(target_modules=["wte", "wpe"]), False),
    "embeddings of tokens": ("llama", {}, lora(trainable_token_indices=[1, 2, 3]), False),
    "embeddings of tokens, tied": ("llama", TIED, lora(trainable_token_indices=[1, 2, 3]), False),
    "tokens alone": (
        "llama",
        {},
        peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]),
        False,
    ),
    "a head of its own": ("llama", {}, lora(modules_to_save=["lm_head"]), False),
    "a norm of its own": ("llama", {}, lora(modules_to_save=["norm"]), False),
    "an mlp of its own": ("llama", {}, lora(modules_to_save=["mlp"]), False),
    "biases": ("gpt2", {}, lora(target_modules=["c_attn"], bias="all"), False),
    "biases of the adapted": ("gpt2", {}, lora(target_modules=["c_attn"], bias="lora_only"), False),
    "IA3": (
        "llama",
        {},
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        False,
    ),
    "norms": ("llama", {}, peft.LNTuningConfig(target_modules=["norm"]), False),
    "LoHa": ("llama", {}, peft.LoHaConfig(r=2, target_modules=ATTENTION), False),
    "layers repeated": ("llama", {}, lora(layer_replication=[[0, 2], [1, 3]]), False),
    "patterns of ranks": (
        "llama",
        {},
        lora(target_modules=ATTENTION, rank_pattern={"k_proj": 5}, alpha_pattern={"v_proj": 2}),
        True,
    ),
    "rsLoRA": ("llama", {}, lora(use_rslora=True), True),
    "DoRA": ("llama", {}, lora(target_modules=ATTENTION, use_dora=True), True),
    "an adapter with a bias": ("llama", {}, lora(target_modules=ATTENTION, lora_bias=True), True),
    "Conv1D": ("gpt2", {}, lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True), True),
    "Conv1D, said wrongly": ("gpt2", {}, lora(target_modules=["c_attn", "c_fc"]), True),
}


def saved(make_model: MakeModel, kind: str, folder: Path) -> Path:
    """An adapter as another tool leaves it, with random numbers for all that was trained."""
    model_type, changes, config, _ = KINDS[kind]
    torch.manual_seed(0)
    model = peft.get_peft_model(make_model(model_type, **changes), config)
    move((p for p in model.parameters() if p.requires_grad), 0.2, seed=3)
    model.save_pretrained(str(folder))
    return folder


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_measured_and_continued_as_by_plain_peft(
    kind: str, make_model: MakeModel, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model_type, changes, _, covered = KINDS[kind]
    folder = saved(make_model, kind, tmp_path)
    base = make_model(model_type, **changes)
    plain = peft.PeftModel.from_pretrained(make_model(model_type, **changes), str(folder)).eval()
    sequences = make_sequences(11)
    expected, n_tokens = oracle(plain, sequences)
    assert abs(expected - oracle(base, sequences)[0]) > 30 * 1e-5 * expected  # it matters
    model = load_adapter(make_model(model_type, **changes), folder)
    assert is_covered(model) == covered
    group_of = np.arange(11) % 2
    found = sum(grouped_losses(model, sequences, group_of, Silent()), LossSum())
    assert found.n_tokens == n_tokens
    assert found.sum_nats == pytest.approx(expected, rel=1e-5)
    prompts = [[72, 105], [5, 6, 7, 8, 9, 10], [200]]
    spec = DecodeSpec(max_new_tokens=12)
    texts = generate(model, tiny_tokenizer, prompts, spec, Silent(), end_token_ids=[EOS])
    assert texts == [
        tiny_tokenizer.decode(greedy(plain, p, 12), skip_special_tokens=True) for p in prompts
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["tied head and embeddings", "embeddings of tokens, tied", "IA3"])
def test_its_loss_of_english_text_is_plain_pefts(
    kind: str, make_model: MakeModel, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("swlora.evaluation.english.N_WINDOWS", 1)
    model_type, changes, _, _ = KINDS[kind]
    folder = saved(make_model, kind, tmp_path)
    plain = peft.PeftModel.from_pretrained(make_model(model_type, **changes), str(folder)).eval()
    expected = text_loss(plain, text_windows(tiny_tokenizer, None, 1, 256))
    found = english_loss(load_adapter(make_model(model_type, **changes), folder), tiny_tokenizer)
    assert found.nats_per_token == pytest.approx(expected.nats_per_token, rel=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1),
    ],
)
def test_what_is_no_change_of_weights_is_refused_by_name(
    config: Any, make_model: MakeModel, tmp_path: Path
) -> None:
    peft.get_peft_model(make_model("llama"), config).save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=f"not supported: its type is {config.peft_type.value}"):
        load_adapter(make_model("llama"), tmp_path)
