"""Fixtures that several test files share: real data where it is, tiny models everywhere."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with the real E2E data, the golden scores and GPT-2's tokenizer."""
    folder = Path(os.environ.get("SWLORA_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "e2e-dataset").is_dir():
        pytest.skip(f"no real data: {folder} is absent (set SWLORA_SHARED to the folder)")
    return folder
