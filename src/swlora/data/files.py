"""Which files a name stands for: one, a folder of shards, or a pattern; and their splits.

A file in a folder or pattern is of the split that its name or its folder's says (train, dev or
validation, test), else of train, so that test rows are never trained on by accident.
"""

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from swlora.data.records import READERS, ending
from swlora.errors import UserError
from swlora.paths import expanded, may_be_path

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("dev", "valid", "validation", "val", "eval", "evaluation"), "dev"),
    **dict.fromkeys(("test", "testing"), "test"),
}


_MAGIC = set("*?[")
_OTHER_PACKINGS = (".zst", ".zip", ".bz2", ".xz", ".lz4", ".br")
# Beside the rows that `datasets` saves
_OF_DATASETS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def _is_of_datasets(name: str) -> bool:
    """Say whether a file is a note of `datasets`, or what one of its maps left beside the rows."""
    return name in _OF_DATASETS or re.fullmatch(r"cache-\w+\.arrow", name) is not None


def data_files(name: str) -> list[Path]:
    """Return the files that a name stands for, in order; [] where it is no file, folder or pattern.

    Raises UserError for a folder or a pattern without a file that can be read, and where rows are
    packed in a way that is not read: the rest alone would be trained in silence.
    """
    path = expanded(name)
    if not may_be_path(path):
        return []
    if path.is_file():
        _refuse_packed([path])
        return [path] if ending(path) else []
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not _is_of_datasets(p.name))
        inside = [p for p in files if not any(part.startswith(".") for part in _inner(p, path))]
    elif _MAGIC & set(name):
        inside = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    else:
        return [path] if ending(path) else []
    _refuse_packed(inside)
    found = [p for p in inside if ending(p)]
    if not found:
        raise UserError(f"{name} holds no file that can be read: {', '.join(READERS)}, or with .gz")
    return found


def _refuse_packed(files: Sequence[Path]) -> None:
    packed = [
        p
        for p in files
        if p.suffix.lower() in _OTHER_PACKINGS
        and ending(p.with_suffix(""))
        and p.with_suffix("") not in files  # unpacked already
    ]
    if packed:
        more = f" and {len(packed) - 1} more files" if len(packed) > 1 else ""
        raise UserError(
            f"{packed[0]}{more} cannot be read as packed: unpack, or pack with gzip (.gz)"
        )


def split_files(files: Sequence[Path], root: Path) -> dict[str, list[Path]]:
    """Return files by split; a single file that was named itself is of train.

    Raises UserError where none is left to train on.
    """
    by_split: dict[str, list[Path]] = {"train": [], "dev": [], "test": []}
    if list(files) == [root]:
        by_split["train"].append(root)
        return by_split
    for path in files:
        by_split[split_of(*_inner(path, root)) or "train"].append(path)
    if not by_split["train"]:
        names = ", ".join(path.name for path in files[:4])
        raise UserError(f"{root} has no file to train on, only {names}: name one of them itself")
    return by_split


def split_of(*names: str) -> str | None:
    """Return the split ("train", "dev" or "test") that names say, the last first; None for none.

    They are those of a file and of the folders that it lies in, or what the Hub calls a split.
    """
    words = (word for name in reversed(names) for word in re.split(r"[^a-z]+", name.lower()))
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def _inner(path: Path, root: Path) -> tuple[str, ...]:
    """Return the parts of a path below a folder, or below the fixed part of a pattern."""
    fixed = next((i for i, part in enumerate(root.parts) if _MAGIC & set(part)), len(root.parts))
    return path.parts[fixed:]
