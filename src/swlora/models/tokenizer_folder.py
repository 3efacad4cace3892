"""A tokenizer's files, looked at before a library reads them.

Added tokens are what takes it long: two seconds for 10,000.
"""

from collections.abc import Sized
from pathlib import Path
from typing import Any

from swlora.bounded_read import UnreadableError, read_json_value
from swlora.errors import UserError
from swlora.models.model_folder import check_regular_files

TOKENIZER = "tokenizer.json"
MAX_FILE_BYTES = 128 << 20  # Gemma 3's has 33 million
MAX_ADDED_TOKENS = 20_000  # Gemma 3's has 6,415
# Where each file has its added tokens; "" for the whole.
_ADDED = {
    TOKENIZER: "added_tokens",
    "tokenizer_config.json": "added_tokens_decoder",
    "special_tokens_map.json": "additional_special_tokens",
    "added_tokens.json": "",
}


def check_tokenizer_folder(folder: Path) -> None:
    """Raise UserError, one line, where a folder's tokenizer must not be handed to a library."""
    check_regular_files(folder)
    check_added_tokens(folder)


def check_added_tokens(folder: Path) -> None:
    """Raise UserError for a file of a tokenizer that is too large or adds too many tokens."""
    for name, key in _ADDED.items():
        path = folder / name
        if not path.exists():
            continue
        try:
            value = read_json_value(path, max_bytes=MAX_FILE_BYTES)
        except UnreadableError as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if (n_added := _n_added(value, key)) > MAX_ADDED_TOKENS:
            raise UserError(
                f"{path} adds {n_added:,} tokens to its vocabulary; "
                f"{MAX_ADDED_TOKENS:,} is the most"
            )


def _n_added(value: Any, key: str) -> int:
    added = value if not key else value.get(key) if isinstance(value, dict) else None
    return len(added) if isinstance(added, Sized) else 0
