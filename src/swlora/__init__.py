"""LoRA fine-tuning with the same gradient for a fraction of the work, and super weights."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swlora.api import compare, evaluate, export, generate, identify, load, merge, train
    from swlora.integrations.patch import patch
    from swlora.integrations.prefix_sampler import PrefixSampler
    from swlora.integrations.trainer import TreeTrainerMixin
    from swlora.integrations.tree_loss import tree_loss
    from swlora.training.callbacks import StepReport

__version__ = version("swlora")
__all__ = [
    "PrefixSampler",
    "StepReport",
    "TreeTrainerMixin",
    "__version__",
    "compare",
    "evaluate",
    "export",
    "generate",
    "identify",
    "load",
    "merge",
    "patch",
    "train",
    "tree_loss",
]
_ELSEWHERE = {
    "PrefixSampler": "integrations.prefix_sampler",
    "StepReport": "training.callbacks",
    "TreeTrainerMixin": "integrations.trainer",
    "patch": "integrations.patch",
    "tree_loss": "integrations.tree_loss",
}


def __getattr__(name: str) -> Any:
    """Import a name's module when it is first asked for.

    Commands' functions import torch when they are called, what works inside other loops at once.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"swlora.{_ELSEWHERE.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
