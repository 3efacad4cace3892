"""Every fast forward there is, put into a model for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from swlora.kernels.fused import fused_modules
from swlora.kernels.lora import fast_lora


@contextmanager
def fast_modules(model: Any) -> Iterator[None]:
    """Use every fast forward there is, for LoRA, norms and MLPs, while the body runs."""
    with fast_lora(model), fused_modules(model):
        yield
