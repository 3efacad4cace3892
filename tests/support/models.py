"""Types of the fixtures that make models (see tests/conftest.py), and a model of another loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MakeModel = Callable[..., Any]  # make_model: (model_type, seed=0, **changes) -> a tiny model
ModelFolder = Callable[[str], Path]  # model_folder: model_type -> the folder of that model


def add_to_loss(base: Any) -> Any:
    """Give a model of transformers a class whose forward adds 1 to the loss."""

    class Penalised(type(base)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            if isinstance(output.loss, torch.Tensor):
                output.loss = output.loss + 1
            return output

    base.__class__ = Penalised
    return base
