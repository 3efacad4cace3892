"""A tree of control groups of the test's own, in the place of the machine's."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from swlora import cgroup


def lay_groups(
    monkeypatch: pytest.MonkeyPatch, folder: Path, own: str, files: Mapping[str, str]
) -> Path:
    """Write files by their paths in the tree, and `own` as /proc/self/cgroup; return the tree."""
    trees = folder / "trees"
    trees.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (trees / name).parent.mkdir(parents=True, exist_ok=True)
        (trees / name).write_text(f"{content}\n")
    (folder / "own").write_text(own)
    monkeypatch.setattr(cgroup, "TREES", trees)
    monkeypatch.setattr(cgroup, "OWN_GROUPS", folder / "own")
    return trees
