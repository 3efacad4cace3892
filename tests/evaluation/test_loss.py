"""The loss of a data set against one padded batch of everything."""

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.support.adapters import attach, move, randomise
from tests.support.models import MakeModel

from swlora.adapters.methods import METHODS, adapt
from swlora.config import AdapterSpec
from swlora.data.token_sequences import TokenSequences
from swlora.errors import RunFailedError
from swlora.evaluation import loss as loss_module
from swlora.evaluation.english import N_WINDOWS, english_loss
from swlora.evaluation.loss import (
    SEQUENCES_AT_ONCE,
    dataset_loss,
    grouped_losses,
)
from swlora.kernels.tree_layout import TreeLayout
from swlora.kernels.tree_walk import TreeWalk
from swlora.loss_sum import LossSum
from swlora.models.anatomy import FAMILIES
from swlora.progress import Silent
from swlora.superweights.ablate import text_loss, text_windows
from swlora.training.plain import pad, weighted_loss

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
    randomise(peft_model, 0.1)
    return peft_model


@torch.no_grad()
def oracle(model: Any, sequences: TokenSequences) -> tuple[float, int]:
    batch = pad(sequences, np.arange(len(sequences)), model.device)
    loss, n_tokens = weighted_loss(model, batch)
    return float(loss), n_tokens


class Recorded(Silent):
    """Counts what it was told."""

    def __init__(self) -> None:
        self.amount, self.total, self.notes = 0.0, -1.0, [""]

    def task(self, description: str, total: float | None = None, done: float = 0.0) -> Any:
        self.total = -1.0 if total is None else total
        return super().task(description, total, done)

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


def nested_prompts() -> tuple[TokenSequences, np.ndarray]:
    """Prompts that begin with one another, so that one's completion runs through another's prompt;
    a completion that two prompts share node by node; duplicates; single prompts.
    """
    pairs = [
        ([5], [6, 7, 8]),
        ([5, 6], [7, 8]),
        ([5, 6], [7, 8]),
        ([5, 6, 7], [8]),
        ([5], [6]),
        ([9, 5], [6, 7]),
        ([5, 6], [7, 9, 9, 9]),
    ]
    return TokenSequences.from_lists(pairs), np.array([2, 0, 0, 3, 2, 1, 0])


def assert_groups_equal_oracle(model: Any, sequences: TokenSequences, group_of: Any) -> None:
    found = grouped_losses(model, sequences, group_of, Silent())
    assert len(found) == group_of.max() + 1
    for group, loss in enumerate(found):
        ids = np.flatnonzero(group_of == group)
        with torch.no_grad():
            expected, n_tokens = weighted_loss(model, pad(sequences, ids, model.device))
        assert loss.n_tokens == n_tokens
        assert loss.sum_nats == pytest.approx(float(expected), rel=1e-5)
    total = sum(found, LossSum())
    plain = dataset_loss(model, sequences, Silent())
    assert total.n_tokens == plain.n_tokens
    assert total.sum_nats == pytest.approx(plain.sum_nats, rel=1e-6)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "falcon"])
def test_every_prompt_has_its_own_loss(make_model: MakeModel, model_type: str) -> None:
    model = adapted(make_model(model_type))
    assert_groups_equal_oracle(model, *nested_prompts())
    sequences = make_sequences(2 * SEQUENCES_AT_ONCE + 5)
    prompts = [
        tuple(sequences.tokens[a : a + n])
        for a, n in zip(sequences.offsets[:-1], sequences.prompt_lengths, strict=True)
    ]
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    assert_groups_equal_oracle(model, sequences, np.array([numbers[p] for p in prompts]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ["llama", "falcon"])
def test_every_method_is_measured_with_its_adapter_on(
    make_model: MakeModel, tiny_tokenizer: Any, model_type: str, method: str
) -> None:
    """Before the training's end and after it, where some methods are given another form."""
    base = make_model(model_type)
    untouched = english_loss(base, tiny_tokenizer)
    spec = AdapterSpec.model_validate({"method": method})
    adapted_model = adapt(base, spec, [0, 2], seed=1, n_steps=8)
    move(adapted_model.parameters.values(), 0.1)
    model = adapted_model.model.eval()
    assert_groups_equal_oracle(model, *nested_prompts())
    adapted_model.finish()
    assert_groups_equal_oracle(model.eval(), *nested_prompts())
    windows = text_windows(tiny_tokenizer, None, N_WINDOWS, 256)
    found = english_loss(model, tiny_tokenizer)
    assert found.sum_nats == pytest.approx(text_loss(model, windows).sum_nats, rel=1e-5)
    assert found.sum_nats != pytest.approx(untouched.sum_nats, rel=1e-4)


def test_groups_that_are_no_prompts(make_model: MakeModel) -> None:
    """A group is what the caller says: here each sequence alone, then an arbitrary mixture."""
    model, sequences = make_model("llama"), make_sequences(23)
    assert_groups_equal_oracle(model, sequences, np.arange(23))
    mixture = np.random.default_rng(0).permutation(np.arange(23) % 4)
    assert_groups_equal_oracle(model, sequences, mixture)


@pytest.mark.parametrize("group_of", [np.array([0, 0]), np.array([0, 2, 2]), np.array([[0, 1, 1]])])
def test_groups_that_do_not_fit(make_model: MakeModel, group_of: Any) -> None:
    sequences = TokenSequences.from_lists([([1], [2])] * 3)
    with pytest.raises(ValueError, match="group_of"):
        grouped_losses(make_model("llama"), sequences, group_of, Silent())


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["accelerator", "driver", "cpu"])
def test_trees_that_do_not_fit_are_halved(
    make_model: MakeModel, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sequences = adapted(make_model("llama")), make_sequences(2 * SEQUENCES_AT_ONCE + 5)
    group_of, sizes, failed = np.arange(len(sequences)) % 3, list[int](), list[int]()
    expected = grouped_losses(model, sequences, group_of, Silent())
    whole = TreeWalk.whole

    def with_little_memory(walk: TreeWalk, layout: TreeLayout) -> torch.Tensor:
        if layout.n_nodes > 60:
            failed.append(layout.n_nodes)
            raise error
        sizes.append(layout.n_nodes)
        return whole(walk, layout)

    monkeypatch.setattr(TreeWalk, "whole", with_little_memory)
    progress = Recorded()
    found = grouped_losses(model, sequences, group_of, progress)
    assert failed and len(failed) < len(sizes)  # what did not fit is not tried for every tree
    for loss, own in zip(found, expected, strict=True):
        assert loss.n_tokens == own.n_tokens
        assert loss.sum_nats == pytest.approx(own.sum_nats, rel=1e-6)
    assert progress.amount == progress.total == len(sequences)


def test_padded_batches_that_do_not_fit_are_halved(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sequences = make_model("falcon"), make_sequences(11)
    expected = dataset_loss(model, sequences, Silent())

    def with_little_memory(model: Any, batch: Any) -> Any:
        if len(batch.token_ids) > 3:
            raise OUT_OF_MEMORY[0]
        return weighted_loss(model, batch)

    monkeypatch.setattr(loss_module, "weighted_loss", with_little_memory)
    found = dataset_loss(model, sequences, Silent())
    assert found.n_tokens == expected.n_tokens
    assert found.sum_nats == pytest.approx(expected.sum_nats, rel=1e-6)


@pytest.mark.parametrize(
    ("error", "is_sharded", "raised", "message"),
    [
        (OUT_OF_MEMORY[0], False, RunFailedError, "a single sequence does not fit .*--truncate it"),
        (OUT_OF_MEMORY[0], True, RunFailedError, "memory ran out .*start more processes"),
        (RuntimeError("mat1 and mat2 shapes"), False, RuntimeError, "mat1 and mat2"),
    ],
)
def test_what_halving_does_not_help(
    make_model: MakeModel,
    error: Exception,
    is_sharded: bool,
    raised: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(TreeWalk, "whole", fail)
    monkeypatch.setattr(loss_module, "has_sharded", lambda _model: is_sharded)
    with pytest.raises(raised, match=message):
        dataset_loss(make_model("llama"), make_sequences(9), Silent())
