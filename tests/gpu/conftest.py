"""The device of these tests: CUDA, or the CPU where a dry run asks for it."""

import os
from collections.abc import Iterator

import pytest
import torch

from swlora.kernels import torch_attention
from swlora.kernels.cuda_attention import news, prefer


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """ "cuda"; with SWLORA_GPU_TESTS=cpu "cpu", which shows that the tests themselves run."""
    if not torch.cuda.is_available() and os.environ.get("SWLORA_GPU_TESTS") != "cpu":
        pytest.skip("no CUDA device")
    # Every family and dtype is compiled in this one process.
    monkeypatch.setattr(torch_attention, "MOST_COMPILED", 10_000)
    torch_attention._compiled_flex()
    torch._dynamo.config.recompile_limit = 10_000
    prefer({})
    news()
    yield "cuda" if torch.cuda.is_available() else "cpu"
    prefer({})
