"""Snapshots of a training, in a folder of their own: a kill at any moment leaves a whole one.

    state-7.safetensors   the bytes, complete before      state-7.json   {file, sha256}

A snapshot counts only when its bytes have the sha256 in its JSON file, the manifest. The newest
that counts is taken, and the ones before it go only when a newer one is complete.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swlora.bounded_read import UnreadableError, read_json_object
from swlora.errors import RunFailedError, UserError
from swlora.files import atomic_path, remove_files, sha256_of, write_json

if TYPE_CHECKING:
    from torch import Tensor

OLD_MANIFEST = "manifest.json"  # of older versions, which kept one snapshot
_REMEDY = "see to it that it can be removed, then go on with --resume"
_NAME = re.compile(r"state-(\d+)\.(?:json|safetensors)")


@dataclass(frozen=True)
class Snapshot:
    """The tensors and JSON values of a training; snapshots of a run are numbered from 1."""

    number: int
    tensors: dict[str, "Tensor"]
    values: dict[str, Any]


def save_snapshot(folder: Path, snapshot: Snapshot, keep: int = 1) -> None:
    """Write a snapshot, then remove all others but the `keep` - 1 with the numbers before its own.

    Raises RunFailedError where the disk is full, or what is to be removed stays.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    data_path = folder / f"state-{snapshot.number}.safetensors"
    contents = {
        name: tensor.detach().cpu().contiguous() for name, tensor in snapshot.tensors.items()
    }
    metadata = {"values": json.dumps(snapshot.values, allow_nan=False)}
    with atomic_path(data_path) as scratch:
        try:
            save_file(contents, scratch, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        manifest = {"file": data_path.name, "sha256": sha256_of(scratch)}
    write_json(data_path.with_suffix(".json"), manifest)
    remove_files([folder / OLD_MANIFEST], _REMEDY)
    remove_other_snapshots(folder, snapshot.number, keep)


def remove_other_snapshots(folder: Path, number: int, keep: int) -> None:
    """Remove all snapshots but `number` and the `keep` - 1 with the numbers before it.

    For good, before the run is said to be done: nobody comes to remove them then. Raises
    RunFailedError where one stays.
    """
    kept = (None, *range(number - keep + 1, number + 1))
    outdated = sorted(path for path in folder.glob("state-*") if _number(path) not in kept)
    remove_files(outdated, _REMEDY)  # a manifest before its bytes


def load_snapshot(folder: Path, say: Callable[[str], None]) -> Snapshot | None:
    """Return the newest whole snapshot in `folder`, None where none was completed.

    `say` is told why a newer one was left out. Raises RunFailedError where all are damaged.
    """
    from safetensors import safe_open

    left_out: list[str] = []
    for manifest in _manifests(folder):
        try:
            path = _whole(manifest)
        except UserError as error:
            left_out.append(str(error))
            continue
        for reason in left_out:
            say(f"{reason}; an older one is taken")
        with safe_open(path, "pt") as file:
            values = json.loads(file.metadata()["values"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Snapshot(_number(path) or 0, tensors, values)
    if left_out:
        raise RunFailedError(f"{'; '.join(left_out)}; start again in another --output")
    return None


def has_snapshot(folder: Path) -> bool:
    """Say whether a snapshot was completed in `folder`, whatever became of its bytes since."""
    return any(_manifests(folder))


def _manifests(folder: Path) -> Iterator[Path]:
    """Yield the manifests in a folder, the newest first."""
    found = [path for path in folder.glob("state-*.json") if _number(path) is not None]
    yield from sorted(found, key=lambda path: _number(path) or 0, reverse=True)
    if (old := folder / OLD_MANIFEST).exists():
        yield old


def _whole(manifest: Path) -> Path:
    """Return the file of bytes that a manifest is of; UserError where it is not as it was saved."""
    try:
        facts = read_json_object(manifest, follow_links=False)
    except UnreadableError as error:
        raise UserError(f"the checkpoint {manifest} is damaged: {error}") from error
    path = manifest.parent / str(facts.get("file"))
    if not _NAME.fullmatch(path.name) or path.parent != manifest.parent or not path.is_file():
        raise UserError(f"the checkpoint {manifest} is damaged: its {path.name} is not there")
    try:
        is_as_saved = sha256_of(path) == facts.get("sha256")
    except OSError as error:
        raise UserError(f"the checkpoint {path} cannot be read: {error.strerror}") from error
    if not is_as_saved:
        raise UserError(f"the checkpoint {path} is damaged: it is not as it was saved")
    return path


def _number(path: Path) -> int | None:
    """Return the number of a snapshot by the name of one of its files; None for other files."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None
