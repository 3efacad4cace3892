"""What the tests of training share: a dozen sequences, short trials, a cache of their own."""

from pathlib import Path

import pytest
import torch

from swlora.data.token_sequences import TokenSequences
from swlora.training import layer_trial


@pytest.fixture
def short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of 8 steps of two sequences."""
    monkeypatch.setattr(layer_trial, "TRIAL_EXAMPLES", 16)
    monkeypatch.setattr(layer_trial, "PROFILED_EXAMPLES", 6)


@pytest.fixture
def sequences() -> TokenSequences:
    """Twelve sequences of four prompts."""
    torch.manual_seed(3)
    prompts = [torch.randint(3, 40, (n,)).tolist() for n in (4, 4, 7, 2)]
    return TokenSequences.from_lists(
        [(p, torch.randint(3, 40, (5 + i,)).tolist()) for i, p in enumerate(prompts * 3)]
    )


@pytest.fixture
def prefix_folder(fresh_cache: Path) -> Path:
    """The folder of the prefix caches of this test alone."""
    return fresh_cache / "prefix"
