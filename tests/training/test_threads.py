"""What the number of threads changes: the speed, and in float32 the last digits of a sum.

In bfloat16 gradients are the same to the last bit; in float32 the BLAS of torch splits long sums
among the threads.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.adapters import attach, fill_b
from torch import Tensor

from swlora.adapters.methods import train_mode, trainable_parameters
from swlora.config import AdapterSpec, ModelSpec
from swlora.data.token_sequences import TokenSequences
from swlora.kernels import block_walk, tree_attention
from swlora.models.load import load_model
from swlora.training.step import TreeStep


@pytest.fixture
def threads_after() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def gradients(step: TreeStep, groups: list[np.ndarray]) -> dict[str, Tensor]:
    step.peft_model.zero_grad(set_to_none=True)
    sum_nats = step(groups).sum_nats
    found = {n: p.grad.clone() for n, p in trainable_parameters(step.peft_model).items()}
    return {"loss": torch.tensor(sum_nats, dtype=torch.float64), **found}


def sequences(n_vocabulary: int) -> TokenSequences:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(1, n_vocabulary, 21).tolist() for _ in range(5)]
    answers = [rng.integers(1, n_vocabulary, 9 + i % 17).tolist() for i in range(24)]
    return TokenSequences.from_lists([(prompts[i % 5], a) for i, a in enumerate(answers)])


@pytest.fixture(scope="module")
def found() -> Callable[[str], dict[Any, dict[str, Tensor]]]:
    """A function dtype -> loss and gradients with two threads, with one, and with a change."""

    def measure(dtype: str) -> dict[Any, dict[str, Tensor]]:
        model = load_model(ModelSpec(name="builtin", dtype=dtype)).model
        peft_model = attach(model, AdapterSpec(rank=4), list(range(30)), seed=0)
        fill_b(peft_model, 0.02, seed=0)
        train_mode(peft_model)
        groups = [np.arange(24)]
        step = TreeStep(peft_model, sequences(40_000))
        results: dict[Any, dict[str, Tensor]] = {}
        for n in (2, 1):
            torch.set_num_threads(n)
            results[n] = gradients(step, groups)
        with pytest.MonkeyPatch.context() as patch:
            for module in (block_walk, tree_attention):  # forward, backward
                patch.setattr(module, "adapt_threads", alternating())
            results["changing"] = gradients(step, groups)
        return results

    return measure


@pytest.mark.slow
def test_in_bfloat16_gradients_are_the_same_bits_with_any_number_of_threads(found, threads_after):
    results = found("bfloat16")
    assert all(gradient.norm() > 0 for gradient in results[2].values())
    for other in (1, "changing"):
        pairs = [(n, g, results[other][n]) for n, g in results[2].items()]
        different = [name for name, g, of_other in pairs if not torch.equal(g, of_other)]
        assert not different, (other, different[:3])


@pytest.mark.slow
def test_in_float32_gradients_differ_by_the_rounding_of_a_sum_at_most(found, threads_after):
    results = found("float32")
    for other in (1, "changing"):
        for name, gradient in results[2].items():
            distance = (gradient - results[other][name]).norm() / gradient.norm()
            assert distance < 1e-5, (other, name, float(distance))


def alternating() -> Callable[[], Any]:
    """A stand-in for `adapt_threads` that uses one thread and two by turns."""
    calls = iter(range(10**9))
    return lambda: torch.set_num_threads(1 + next(calls) % 2)
