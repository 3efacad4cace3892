"""A model, an adapter or GGUF files from the Hub into a folder that is complete or absent.

Only plain data is taken, by the ends of its names; every file is held against the hash that the Hub
gives for it, and the commit that they came from is written down beside them.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swlora.deploy.hub_access import check_reachable, check_repo_name, hub_errors
from swlora.deploy.hub_files import PULLED, READABLE, git_sha1_of, kind_of
from swlora.deploy.new_folder import check_new, new_folder
from swlora.disk_space import Need, check_space
from swlora.errors import RunFailedError, UserError
from swlora.files import sha256_of, write_json
from swlora.plural import counted
from swlora.progress import Progress
from swlora.result_json import as_json

GB = 10**9


@dataclass(frozen=True)
class Pulled:
    """What was taken from the Hub: sizes of the files by name, and the commit that they are of.

    `revision` is what was asked for, None for the newest of the default branch. `left_out` are the
    names in the repository that were not taken.
    """

    repo: str
    revision: str | None
    commit: str
    kind: str
    n_bytes: dict[str, int]
    left_out: list[str]
    folder: Path


def pull(
    repo: str, revision: str | None, output: Path, *, max_gb: float, progress: Progress
) -> Pulled:
    """Download what can be used of `repo` into the new folder `output`.

    Raises UserError where that exists, where the repository holds nothing to use or more than
    `max_gb` or the disk takes, and for access; RunFailedError where Hub or connection fail. Then
    there is no folder.
    """
    from huggingface_hub import HfApi

    check_repo_name(repo)
    check_new(output)
    check_reachable()
    with hub_errors(repo, revision, writes=False):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    files = {f.rfilename: f for f in info.siblings or [] if READABLE.fullmatch(f.rfilename)}
    left_out = sorted({f.rfilename for f in info.siblings or []} - set(files) - {".gitattributes"})
    try:
        kind = kind_of(list(files))
    except UserError as error:
        raise UserError(f"{repo} cannot be used here: {error}") from error
    sizes = {name: int(file.size or 0) for name, file in sorted(files.items())}
    _check_size(repo, sum(sizes.values()), max_gb, output)
    pulled = Pulled(repo, revision, str(info.sha), kind, sizes, left_out, output)
    with new_folder(output) as scratch:
        with hub_errors(repo, revision, writes=False):
            _download(pulled, files, scratch, progress)
        write_json(scratch / PULLED, {k: v for k, v in as_json(pulled).items() if k != "folder"})
    return pulled


def _check_size(repo: str, n_bytes: int, max_gb: float, output: Path) -> None:
    if n_bytes > max_gb * GB:
        raise UserError(
            f"{repo} has {n_bytes / GB:.1f} GB to take, more than --max-gb {max_gb:g}; give more"
        )
    check_space(output, [Need(f"files of {repo}", n_bytes)], "choose another --output")


def _download(pulled: Pulled, files: dict[str, Any], scratch: Path, progress: Progress) -> None:
    from huggingface_hub import hf_hub_download

    n_bytes = sum(pulled.n_bytes.values())
    said = f"take {counted(len(files), 'file')}, {n_bytes / 10**6:,.1f} MB, from {pulled.repo}"
    with progress.task(said, n_bytes) as task:
        for name, file in sorted(files.items()):
            hf_hub_download(pulled.repo, name, revision=pulled.commit, local_dir=scratch)
            _check_hash(pulled.repo, scratch / name, file)
            task.advance(pulled.n_bytes[name], name)
    shutil.rmtree(scratch / ".cache", ignore_errors=True)  # the library's own notes


def _check_hash(repo: str, path: Path, file: Any) -> None:
    """Raise RunFailedError where a file is not what the Hub says it is."""
    if file.lfs is not None:
        is_right = sha256_of(path) == file.lfs.sha256
    else:
        is_right = file.blob_id is None or git_sha1_of(path) == file.blob_id
    if not is_right:
        raise RunFailedError(f"{path.name} of {repo} came other than the Hub says; run it again")
