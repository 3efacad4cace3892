"""A model without content: its modules on the meta device, which have shapes and no numbers."""

from typing import Any

from swlora.errors import UserError, brief


def make_skeleton(config: Any, name: str) -> Any:
    """Return the model that a transformers configuration describes, without content, in eval mode.

    Raises UserError where it describes none; `name` says whose configuration it is.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of whichever module cannot be made of its numbers
        raise UserError(f"config.json of {name} describes no model: {brief(error)}") from error
    return model.requires_grad_(False).eval()
