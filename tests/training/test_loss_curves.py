"""Whole trainings in bfloat16: tree steps and plain steps learn alike."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.adapters import attach
from tests.support.models import MakeModel
from tests.support.sequences import Pair

from swlora.adapters.methods import train_mode, trainable_parameters
from swlora.config import AdapterSpec
from swlora.data.steps import plan_steps
from swlora.data.token_sequences import TokenSequences
from swlora.models.precision import cast_parameters
from swlora.training.plain import PlainStep
from swlora.training.step import TreeStep


def grammar() -> TokenSequences:
    """Prompts with four completions each, every token of which follows from the two before it."""
    rng = np.random.default_rng(8)
    pairs: list[Pair] = []
    for _ in range(80):
        prompt = rng.integers(1, 50, int(rng.integers(4, 12))).tolist()
        for first in rng.integers(50, 60, 4).tolist():
            text = [prompt[-1], first]
            for _ in range(int(rng.integers(5, 20))):
                text.append((3 * text[-1] + text[-2]) % 97 + 60)
            pairs.append((prompt, [*text[1:], 0]))
    return TokenSequences.from_lists(pairs)


def loss_curve(make_model: MakeModel, step_class: Any, seed: int, n_steps: int) -> np.ndarray:
    """Mean loss of each of n_steps optimizer steps in bfloat16, from adapters drawn by `seed`."""
    model = make_model("llama", hidden_size=48, intermediate_size=80, num_hidden_layers=4)
    cast_parameters(model, torch.bfloat16)
    peft_model = attach(model, AdapterSpec(rank=8, alpha=16), [1, 2, 3], seed=seed)
    train_mode(peft_model)
    sequences = grammar()
    step = step_class(peft_model, sequences)
    parameters = trainable_parameters(peft_model).values()
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    losses: list[float] = []
    for epoch in range(n_steps):
        for groups in plan_steps(
            sequences,
            sequences_per_step=16,
            max_tokens_per_tree=400,
            order="prompts",
            seed=0,
            epoch=epoch,
        ):
            loss = step(groups)
            losses.append(loss.nats_per_token)
            for parameter in parameters:
                parameter.grad /= loss.n_tokens
            optimizer.step()
            optimizer.zero_grad()
            if len(losses) == n_steps:
                return np.array(losses)
    raise AssertionError("an epoch has no step")


@pytest.mark.slow
def test_bfloat16_loss_curves_lie_within_the_noise_of_seeds(make_model: MakeModel) -> None:
    torch.set_num_threads(1)
    seeds, n_steps, window = range(3), 200, 20

    def smooth_curves(step_class: Any) -> list[np.ndarray]:
        curves = [loss_curve(make_model, step_class, seed, n_steps) for seed in seeds]
        assert all(curve[-window:].mean() < 0.75 * curve[:window].mean() for curve in curves)
        return [np.convolve(curve, np.ones(window) / window, "valid") for curve in curves]

    plain, tree = smooth_curves(PlainStep), smooth_curves(TreeStep)
    between_seeds = [float(np.abs(plain[a] - plain[b]).mean()) for a, b in combinations(seeds, 2)]
    between_engines = [float(np.abs(p - t).mean()) for p, t in zip(plain, tree, strict=True)]
    print(f"\nbetween seeds {between_seeds}, between engines {between_engines}")
    print(f"first and last loss: {plain[0][0]:.3f} {plain[0][-1]:.3f} {tree[0][-1]:.3f}")
    assert max(between_engines) < np.mean(between_seeds)
