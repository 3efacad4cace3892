"""What config.json describes, held against the headers of the weights beside it.

A library makes room for what a configuration describes before it looks at the weights.
"""

from pathlib import Path

from swlora.errors import UserError
from swlora.models.weight_source import SafetensorsWeights
from swlora.plural import counted

# What is missing up to here is named when the model is loaded.
_MAX_NUMBERS_PER_STORED = 2
_MAX_NUMBERS_PER_PACKED = 16  # of 2 bits, in numbers of 32


def check_declared_size(folder: Path) -> int:
    """Return how many numbers the weights of a model are.

    Raises UserError where config.json describes other or far more weights than lie beside it.
    """
    weights = SafetensorsWeights(folder)
    if (model := weights.skeleton) is None:
        return weights.n_numbers
    described = {name: tuple(p.shape) for name, p in model.named_parameters()}
    is_packed = getattr(model.config, "quantization_config", None) is not None
    for name in () if is_packed else weights.names:
        if (shape := described.get(name, weights.shape(name))) != weights.shape(name):
            raise UserError(
                f"the model {folder} cannot be loaded: its config.json makes {name} "
                f"{_times(shape)}, and the weights beside it have {_times(weights.shape(name))}"
            )
    n_described = int(sum(p.numel() for p in model.parameters()))
    most = weights.n_numbers * (_MAX_NUMBERS_PER_PACKED if is_packed else _MAX_NUMBERS_PER_STORED)
    if n_described > most:
        raise UserError(
            f"the model {folder} cannot be loaded: its config.json describes {n_described:,} "
            f"numbers in {counted(model.config.num_hidden_layers, 'layer')}, and the weights "
            f"beside it are {weights.n_numbers:,}"
        )
    return n_described


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{size:,}" for size in shape) or "a single number"
