"""By what a model's files and its tokenizer are known again when a run goes on."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swlora.files import sha256_of
from swlora.hub import cached_file
from swlora.models.load import LoadedModel
from swlora.models.weight_source import weight_files

WHOLE = "weights_sha256 "  # what the names of facts that hold whole hashes begin with


def weight_paths(loaded: LoadedModel) -> list[Path]:
    """Return the files that a model's weights were read from."""
    path = Path(loaded.name)
    if path.is_file():
        return [path]
    if not path.is_dir():
        found = cached_file(loaded.name, "config.json", loaded.revision)
        if found is None:
            return []
        path = Path(found).parent
    return [path / name for name in sorted(weight_files(path))]


def sizes_and_dates(paths: Sequence[Path]) -> dict[str, list[int]]:
    """Return [bytes, time of the last write in ns] of files by their names."""
    return {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in paths}


def whole_hashes(paths: Sequence[Path]) -> dict[str, str]:
    """Return the sha256 of files by their names, as facts of a run."""
    return {f"{WHOLE}{path.name}": sha256_of(path) for path in paths}


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash a tokenizer: its vocabulary and rules, the tokens with a meaning, the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    digest = hashlib.sha256()
    for part in (rules, special, tokenizer.chat_template):
        digest.update(repr(part).encode())
    return digest.hexdigest()
