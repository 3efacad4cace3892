"""LoRA fine-tuning with the same gradient for a fraction of the work, and super weights."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swlora.api import compare, evaluate, generate, identify, load, merge, train
    from swlora.integrations.patch import patch
    from swlora.integrations.prefix_sampler import PrefixSampler
    from swlora.integrations.trainer import TreeTrainerMixin
    from swlora.integrations.tree_loss import tree_loss

__version__ = version("swlora")
__all__ = [
    "PrefixSampler",
    "TreeTrainerMixin",
    "__version__",
    "compare",
    "evaluate",
    "generate",
    "identify",
    "load",
    "merge",
    "patch",
    "train",
    "tree_loss",
]
_INTEGRATIONS = {
    "PrefixSampler": "prefix_sampler",
    "TreeTrainerMixin": "trainer",
    "patch": "patch",
    "tree_loss": "tree_loss",
}


def __getattr__(name: str) -> Any:
    """Load a function when it is first asked for: `import swlora` alone imports no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _INTEGRATIONS:
        return getattr(import_module(f"swlora.integrations.{_INTEGRATIONS[name]}"), name)
    return getattr(import_module("swlora.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
