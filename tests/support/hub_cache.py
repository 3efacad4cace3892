"""Folders as the Hub's client lays them out in its cache, where every file is a link to a blob."""

import hashlib
import shutil
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def use_hub_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Have the client and transformers look for cached files in `cache`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))


def into_hub_cache(folder: Path, cache: Path, repo_id: str, commit: str = COMMIT) -> Path:
    """Put a folder's files into a cache as commit `commit` of a repository, which `main` is.

    Return the folder of that commit: blobs/HASH are the files, snapshots/COMMIT/NAME relative links
    to them, refs/main the commit.
    """
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for made in (repository / "blobs", repository / "refs", snapshot):
        made.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, repository / "blobs" / digest)
        (snapshot / path.name).symlink_to(Path("../../blobs") / digest)
    (repository / "refs" / "main").write_text(commit)
    return snapshot
