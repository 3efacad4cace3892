"""A model's folder, looked at before a library reads it: nothing in it makes one wait.

Weights lie in plain *.safetensors files inside the folder, every file is a regular one, and the
counts in config.json are those of a model that exists.
"""

import stat
from pathlib import Path
from typing import Any

from swlora.bounded_read import UnreadableError, read_json_object
from swlora.errors import UserError
from swlora.models.weight_source import weight_files

CONFIG = "config.json"
MAX_CONFIG_BYTES = 4 << 20
# By what configurations of the known families call them: least, most.
COUNTS = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), (1, 2_000)),
    **dict.fromkeys(("hidden_size", "n_embd"), (1, 1 << 18)),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), (1, 1 << 21)),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads"), (1, 1 << 14)),
    **dict.fromkeys(("num_local_experts", "num_experts"), (0, 1 << 14)),
    **dict.fromkeys(("vocab_size",), (1, 1 << 24)),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), (1, 1 << 28)),
}


def check_model_folder(folder: Path, *, weights: bool = True) -> None:
    """Raise UserError, one line, where the folder of a model must not be handed to a library.

    `weights` says whether they are to be read, too.
    """
    check_regular_files(folder)
    check_counts(folder / CONFIG)
    if weights and (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} holds a model and an adapter, which would be put on in silence: merge it, "
            "or give the adapter a folder of its own"
        )
    if weights:
        weight_files(folder)


def check_regular_files(folder: Path) -> None:
    """Raise UserError for a pipe or a device among the files of a folder, on which one waits.

    A link to nothing is left to whoever wants to read it.
    """
    for path in sorted(folder.iterdir()):
        try:
            mode = path.stat().st_mode
        except OSError:
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError(f"{path} is no regular file, so {folder} is not loaded")


def check_counts(path: Path) -> None:
    """Raise UserError where a config.json is damaged, or counts what no model has."""
    if not path.exists():
        return  # the library says what is missing
    config = read_model_json(path)
    for name, value in config.items():
        if name in COUNTS and value is not None and not _is_count(value, *COUNTS[name]):
            low, high = COUNTS[name]
            raise UserError(f"{path} says {name} is {value!r:.40}; models have {low} to {high:,}")


def read_model_json(path: Path, *, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file of a model's or adapter's folder; UserError without one.

    Links are followed: in the Hub's cache every file is one.
    """
    try:
        return read_json_object(path, max_bytes=max_bytes)
    except UnreadableError as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _is_count(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
