"""One forward pass over one prompt, observed."""

from typing import Any

from swlora.models.anatomy import Anatomy
from swlora.superweights.detect import Trace, prompt_tokens, trace


def trace_prompt(model: Any, tokenizer: Any, prompt: str) -> Trace:
    """Return what a prompt did in a model, as a search sees it."""
    return trace(Anatomy(model), [prompt_tokens(model, tokenizer, prompt)])[0]
