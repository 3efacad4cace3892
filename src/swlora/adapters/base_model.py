"""The model inside a PeftModel."""

from typing import Any


def base_model_of(model: Any) -> Any:
    """Return the causal language model in a PeftModel; one without PEFT around it as it is.

    Adapters stay in it: PEFT puts them in the place of its modules.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model
