"""The plain step against the definition: one sequence at a time, one token at a time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.support.adapters import attach, randomise

from swlora.adapters.methods import trainable_parameters
from swlora.config import AdapterSpec
from swlora.data.token_sequences import TokenSequences
from swlora.training.plain import PaddedBatch, PlainStep, pad, weighted_loss

EOS = 257


def random_pairs(n: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Prompts of 1 to 9 tokens, completions of 1 to 7 with EOS: no two need the same shape."""
    rng = np.random.default_rng(seed)
    return [
        (
            rng.integers(0, 256, rng.integers(1, 10)).tolist(),
            [*rng.integers(0, 256, rng.integers(0, 7)).tolist(), EOS],
        )
        for _ in range(n)
    ]


def naive_loss(model, pairs, smoothing: float = 0.0) -> tuple[torch.Tensor, int]:
    """Sum (1 - s) * -log p(token) + s * mean over the vocabulary of -log p, token by token."""
    total, n_tokens = torch.zeros(()), 0
    for prompt, completion in pairs:
        ids = [*prompt, *completion]
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        for position in range(len(prompt), len(ids)):
            log_p = torch.log_softmax(logits[position - 1], dim=-1)
            total = total - (1 - smoothing) * log_p[ids[position]] - smoothing * log_p.mean()
            n_tokens += 1
    return total, n_tokens


def gradients(peft_model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in trainable_parameters(peft_model).items()}
    peft_model.zero_grad()
    return found


def largest_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


@pytest.fixture
def peft_model(make_model):
    """An adapter that is no longer at its initial zero, so that A gets a gradient, too."""
    model = attach(make_model("llama"), AdapterSpec(rank=3), [0, 2], seed=0)
    randomise(model, 0.1, seed=9)
    return model


@pytest.mark.parametrize("smoothing", [0.0, 0.15])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt"])
def test_loss_and_gradient_are_those_of_the_definition(model_type, smoothing, make_model):
    model = attach(make_model(model_type), AdapterSpec(rank=3), [0, 2], seed=0)
    pairs = random_pairs(5)
    naive, n_expected = naive_loss(model, pairs, smoothing)
    naive.backward()
    expected = float(naive.detach())
    expected_gradients = gradients(model)
    step = PlainStep(model, TokenSequences.from_lists(pairs), label_smoothing=smoothing)
    loss = step([np.array([3, 0]), np.array([4, 1, 2])])
    assert loss.n_tokens == n_expected == sum(len(completion) for _, completion in pairs)
    assert loss.sum_nats == pytest.approx(expected, rel=1e-5)
    found = {n: g for n, g in gradients(model).items() if expected_gradients[n].any()}
    assert len(found) == len(expected_gradients) // 2  # A gets none while B is zero
    assert largest_error(found, {n: expected_gradients[n] for n in found}) < 1e-5


def test_neither_the_split_into_groups_nor_the_padding_matters(peft_model):
    sequences = TokenSequences.from_lists([*random_pairs(7), (list(range(60)), [1, EOS])])
    step = PlainStep(peft_model, sequences)
    ids = np.arange(8)
    expected_loss = step([ids])
    expected = gradients(peft_model)
    for split in (np.array_split(ids[::-1], 3), [np.array([i]) for i in ids]):
        losses = [step([part]) for part in split]  # separate calls: other padding, same sum
        assert sum(loss.n_tokens for loss in losses) == expected_loss.n_tokens
        sum_nats = sum(loss.sum_nats for loss in losses)
        assert sum_nats == pytest.approx(expected_loss.sum_nats, rel=1e-5)
        assert largest_error(gradients(peft_model), expected) < 1e-5


def test_a_sequence_that_is_repeated_counts_twice(peft_model):
    sequences = TokenSequences.from_lists(random_pairs(2))
    step = PlainStep(peft_model, sequences)
    once, twice = step([np.array([1])]), step([np.array([1, 1])])
    assert twice.sum_nats == pytest.approx(2 * once.sum_nats, rel=1e-6)
    assert twice.n_tokens == 2 * once.n_tokens


class FixedLogits:
    """A model whose logits are a parameter, so that every token's share of the loss shows."""

    device = torch.device("cpu")

    def __init__(self, batch: int, length: int) -> None:
        self.logits = torch.zeros(batch, length, 300, requires_grad=True)

    def __call__(self, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits)


def test_the_prompt_pays_nothing_and_the_end_is_learned():
    pairs = [([11, 12, 13], [14, EOS]), ([21], [22, 23, 24, EOS])]
    sequences = TokenSequences.from_lists(pairs)
    batch = pad(sequences, np.array([0, 1]), torch.device("cpu"))
    model = FixedLogits(*batch.token_ids.shape)
    loss, n_tokens = weighted_loss(model, batch)
    loss.backward()
    scored = {
        (b, t, int(g.argmin()))  # the one logit that shall grow
        for b, row in enumerate(model.logits.grad)
        for t, g in enumerate(row)
        if g.any()
    }
    assert n_tokens == 6
    assert scored == {(0, 2, 14), (0, 3, EOS), (1, 0, 22), (1, 1, 23), (1, 2, 24), (1, 3, EOS)}
    assert float(loss.detach()) == pytest.approx(6 * np.log(300), rel=1e-6)


def test_padding():
    sequences = TokenSequences.from_lists([([7], [8, 9]), ([1, 2, 3], [4, 5]), ([6], [EOS])])
    batch = pad(sequences, np.array([2, 1]), torch.device("cpu"))
    expected = PaddedBatch(
        token_ids=torch.tensor([[6, EOS, 0, 0, 0], [1, 2, 3, 4, 5]]),
        attention_mask=torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]),
        labels=torch.tensor([[-100, EOS, -100, -100, -100], [-100, -100, -100, 4, 5]]),
        weights=torch.tensor([[0.0, 1, 0, 0, 0], [0, 0, 0, 1, 1]]),
    )
    for name in PaddedBatch._fields:
        assert torch.equal(getattr(batch, name), getattr(expected, name)), name


def test_the_loss_of_bfloat16_logits_is_summed_in_float32():
    batch = pad(TokenSequences.from_lists([([1], [2] * 999)]), np.array([0]), torch.device("cpu"))
    model = FixedLogits(1, 1000)
    model.logits = torch.zeros(1, 1000, 300, dtype=torch.bfloat16)
    loss, _ = weighted_loss(model, batch)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(999 * np.log(300), rel=1e-5)
