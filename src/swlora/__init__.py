"""LoRA fine-tuning with the same gradient for a fraction of the work, and super weights."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swlora.api import compare, evaluate, generate, identify, load, merge, train

__version__ = version("swlora")
__all__ = ["__version__", "compare", "evaluate", "generate", "identify", "load", "merge", "train"]


def __getattr__(name: str) -> Any:
    """Load a function when it is first asked for: `import swlora` alone imports no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("swlora.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
