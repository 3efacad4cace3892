"""LoRA fine-tuning with the same gradient for a fraction of the work, and super weights."""

from importlib.metadata import version

__version__ = version("swlora")
