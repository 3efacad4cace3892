"""Trainings with and without the cache of frozen states, and disks that fill up under it."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.adapters import attach
from tests.support.models import MakeModel

from swlora.adapters.methods import train_mode, trainable_parameters
from swlora.config import AdapterSpec, TrainSpec
from swlora.data.fixed_groups import fixed_groups
from swlora.data.steps import StepOrder, plan_steps
from swlora.data.token_sequences import TokenSequences
from swlora.training.frozen_prefix import PrefixCache
from swlora.training.step import TreeStep, make_step

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def make_sequences(seed: int = 0) -> TokenSequences:
    """Ten prompts with one to four completions that begin alike."""
    rng = np.random.default_rng(seed)
    pairs = []
    for number in range(10):
        prompt = [number + 1, *rng.integers(1, 200, rng.integers(1, 9)).tolist()]
        trunk = rng.integers(1, 200, 9).tolist()
        for end in range(1 + number % 4):
            pairs.append((prompt, [*trunk[: 2 * end], 201 + end, 0]))
    return TokenSequences.from_lists(pairs)


def adapted(
    make_model: MakeModel, family: str = "llama", dtype: torch.dtype = torch.float32
) -> Any:
    spec = AdapterSpec(targets=["all-linear"], rank=2, alpha=4)
    model = make_model(family).to(dtype)
    peft_model = attach(model, spec, [1, 2], seed=1)
    train_mode(peft_model)
    return peft_model


def steps_of(
    sequences: TokenSequences, epoch: int, order: StepOrder = "prompts"
) -> list[list[np.ndarray]]:
    return plan_steps(
        sequences,
        sequences_per_step=6,
        max_tokens_per_tree=30,
        order=order,
        seed=0,
        epoch=epoch,
    )


class Run:
    """A training run with or without the cache, `limit_gb` 0, and what it said."""

    def __init__(
        self,
        make_model: MakeModel,
        sequences: TokenSequences,
        *,
        limit_gb: float = 1.0,
        family: str = "llama",
        dtype: torch.dtype = torch.float32,
        order: StepOrder = "prompts",
    ) -> None:
        self.peft_model = adapted(make_model, family, dtype)
        self.order = order
        self.said: list[str] = []
        self.sequences, self.losses = sequences, []
        spec = TrainSpec(cache_gb=limit_gb)
        self.step = make_step(self.peft_model, sequences, spec, self.said.append)
        self.parameters = trainable_parameters(self.peft_model)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=5e-3)

    @property
    def cache(self) -> PrefixCache:
        assert isinstance(self.step, TreeStep)
        assert isinstance(self.step.prefix_source, PrefixCache)
        return self.step.prefix_source

    def epoch(self, number: int = 0) -> "Run":
        for groups in steps_of(self.sequences, number, self.order):
            loss = self.step(groups)
            for parameter in self.parameters.values():
                assert parameter.grad is not None
                parameter.grad /= loss.n_tokens
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.nats_per_token)
        return self

    def close(self) -> "Run":
        self.cache.close()
        return self

    def counts(self) -> tuple[int, int]:
        """Trees of which every state was there, and fixed groups computed."""
        return self.cache.n_read_trees, self.cache.n_computed_groups


def n_trees(sequences: TokenSequences, *epochs: int, order: StepOrder = "prompts") -> int:
    """Trees of epoch 0, or of those named."""
    return sum(len(groups) for e in epochs or (0,) for groups in steps_of(sequences, e, order))


def n_fixed_groups(sequences: TokenSequences) -> int:
    return len(fixed_groups(sequences).n_shared)


def assert_same_adapters(a: Run, b: Run) -> None:
    assert a.losses == b.losses
    for name, parameter in a.parameters.items():
        assert torch.equal(parameter, b.parameters[name]), name


def only_folder(root: Path) -> Path:
    (folder,) = root.iterdir()
    return folder


@contextmanager
def full_disk_after(n_writes: int) -> Iterator[None]:
    """Let n_writes writes succeed, and none after them, while the body runs."""
    write, done = os.pwrite, []

    def limited(*args: Any) -> int:
        if len(done) == n_writes:
            raise NO_SPACE
        done.append(args)
        return write(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", limited)
        yield
