"""What several tests of super weights share."""

import hashlib
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def weights_sha256() -> Callable[[Any], str]:
    """A function model -> the hash of all its weights and of their names."""

    def digest(model: Any) -> str:
        sha256 = hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            sha256.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return sha256.hexdigest()

    return digest
