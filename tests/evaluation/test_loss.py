"""The loss of a data set against one padded batch of everything."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from swlora.adapters.methods import attach, trainable_parameters
from swlora.config import AdapterSpec
from swlora.data.tree_rows import TokenSequences
from swlora.engine.plain import completion_loss, pad
from swlora.evaluation.loss import SEQUENCES_AT_ONCE, dataset_loss
from swlora.models.anatomy import FAMILIES
from swlora.progress import Silent

MakeModel = Callable[..., Any]
MODEL_TYPES = [model_type for family in FAMILIES for model_type in family.model_types]


def make_sequences(n: int) -> TokenSequences:
    """n sequences over a few prompts, with duplicates and one-token completions."""
    rng = np.random.default_rng(n)
    prompts = [rng.integers(1, 200, rng.integers(1, 12)).tolist() for _ in range(1 + n // 5)]
    pairs = [
        (prompts[rng.integers(len(prompts))], rng.integers(1, 4, rng.integers(1, 8)).tolist())
        for _ in range(n)
    ]
    return TokenSequences.from_lists(pairs)


def adapted(model: Any) -> Any:
    n_layers = int(model.config.num_hidden_layers)
    peft_model = attach(model, AdapterSpec(rank=2), [0, n_layers - 1], seed=1).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for parameter in trainable_parameters(peft_model).values():
            torch.nn.init.normal_(parameter, std=0.1)
    return peft_model


@torch.no_grad()
def oracle(model: Any, sequences: TokenSequences) -> tuple[float, int]:
    batch = pad(sequences, np.arange(len(sequences)), model.device)
    loss, n_tokens = completion_loss(model, batch)
    return float(loss), n_tokens


class Recorded(Silent):
    """Counts what it was told."""

    def __init__(self) -> None:
        self.amount, self.total, self.notes = 0.0, -1.0, [""]

    def task(self, description: str, total: float | None = None) -> Any:
        self.total = -1.0 if total is None else total
        return super().task(description, total)

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        self.amount += amount
        self.notes.append(note)


def assert_equals_oracle(model: Any, sequences: TokenSequences) -> None:
    expected, n_tokens = oracle(model, sequences)
    progress = Recorded()
    found = dataset_loss(model, sequences, progress)
    assert found.n_tokens == n_tokens
    assert found.sum_nats == pytest.approx(expected, rel=1e-6)
    assert progress.amount == progress.total == len(sequences)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_equals_the_padded_sum(make_model: MakeModel, model_type: str) -> None:
    model, sequences = make_model(model_type), make_sequences(23)
    assert_equals_oracle(model, sequences)
    bare = dataset_loss(model, sequences, Silent())
    peft_model = adapted(model)
    assert_equals_oracle(peft_model, sequences)
    assert dataset_loss(peft_model, sequences, Silent()).sum_nats != pytest.approx(bare.sum_nats)


@pytest.mark.parametrize("n", [1, SEQUENCES_AT_ONCE, 2 * SEQUENCES_AT_ONCE + 5])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "falcon"])
def test_data_of_any_size(make_model: MakeModel, model_type: str, n: int) -> None:
    assert_equals_oracle(adapted(make_model(model_type)), make_sequences(n))


def test_sequences_of_the_whole_context(make_model: MakeModel) -> None:
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(1, 200, 5).tolist(), rng.integers(1, 200, 250).tolist())] * 2
    pairs += [(rng.integers(1, 200, 250).tolist(), rng.integers(1, 200, 5).tolist())] * 2
    assert_equals_oracle(make_model("gpt2"), TokenSequences.from_lists(pairs))


def test_weights_that_are_not_frozen(make_model: MakeModel) -> None:
    model = make_model("llama").requires_grad_()
    assert_equals_oracle(model, make_sequences(11))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("model_type", ["llama", "falcon"])
def test_the_model_is_as_before(make_model: MakeModel, model_type: str) -> None:
    peft_model, sequences = adapted(make_model(model_type)), make_sequences(9)
    before = oracle(peft_model, sequences)
    dataset_loss(peft_model, sequences, Silent())
    assert oracle(peft_model, sequences) == before
    assert not [name for name, m in peft_model.named_modules() if "forward" in vars(m)]
    assert all(parameter.grad is None for parameter in peft_model.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2, 3]},
        {"target_modules": ["q_proj"], "use_dora": True},
    ],
    ids=lambda config: "-".join(map(str, config.values())),
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters_from_elsewhere(make_model: MakeModel, config: dict[str, Any], tied: bool) -> None:
    peft_model = get_peft_model(
        make_model("llama", tie_word_embeddings=tied), LoraConfig(r=2, **config)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                torch.nn.init.normal_(parameter, std=0.1)
    assert_equals_oracle(peft_model.eval(), make_sequences(23))
    assert_equals_oracle(peft_model.requires_grad_(False), make_sequences(23))


def test_disabled_adapters_count_for_nothing(make_model: MakeModel) -> None:
    model, sequences = make_model("llama"), make_sequences(9)
    expected = dataset_loss(model, sequences, Silent())
    peft_model = adapted(model)
    with peft_model.disable_adapter():
        found = dataset_loss(peft_model, sequences, Silent())
    assert found.sum_nats == pytest.approx(expected.sum_nats, rel=1e-6)
