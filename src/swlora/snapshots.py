"""Snapshots of a training, in a folder of their own: a kill at any moment leaves a whole one.

The bytes go to a file with a name of its own, then the manifest (name, sha256) is renamed into
place, then the previous file is removed. A snapshot counts only when its manifest matches its
bytes.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swlora.errors import RunFailedError
from swlora.files import atomic_path, sha256_of, write_json

if TYPE_CHECKING:
    from torch import Tensor


def save_snapshot(folder: Path, tensors: dict[str, "Tensor"], values: dict[str, Any]) -> None:
    """Replace the snapshot in `folder` by `tensors` and JSON `values`; the old one stays until
    the new one is complete.

    Raises RunFailedError where the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    numbers = [int(path.stem.partition("-")[2]) for path in folder.glob("state-*.safetensors")]
    data_path = folder / f"state-{max(numbers, default=0) + 1}.safetensors"
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"values": json.dumps(values, allow_nan=False)}
    with atomic_path(data_path) as scratch:
        try:
            save_file(contents, scratch, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error
    write_json(folder / "manifest.json", {"file": data_path.name, "sha256": sha256_of(data_path)})
    for stale in folder.glob("state-*.safetensors"):
        if stale != data_path:
            stale.unlink()


def load_snapshot(folder: Path) -> tuple[dict[str, "Tensor"], dict[str, Any]] | None:
    """Return (tensors, values) of the snapshot in `folder`, or None where none was completed.

    Raises RunFailedError where its bytes are not those that were saved.
    """
    from safetensors import safe_open

    path = folder / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        path = folder / manifest["file"]
        whole = path.is_file() and sha256_of(path) == manifest["sha256"]
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise RunFailedError(f"the checkpoint {path} is damaged; start again in another --output")
    with safe_open(path, "pt") as file:
        values = json.loads(file.metadata()["values"])
        return {name: file.get_tensor(name) for name in file.keys()}, values  # noqa: SIM118
