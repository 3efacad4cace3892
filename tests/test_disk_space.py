"""What is needed on a disk is compared with what is free, in one line."""

import shutil
from pathlib import Path

import pytest

from swlora.disk_space import Need, check_space, free_bytes, on_one_disk, size
from swlora.errors import UserError


@pytest.mark.parametrize(
    ("n_bytes", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 KB"),
        (12_345_678, "12 MB"),
        (3.04e9, "3.0 GB"),
    ],
)
def test_sizes_in_words(n_bytes: float, words: str) -> None:
    assert size(n_bytes) == words


def test_the_parts_the_sum_and_what_is_free_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    folder = tmp_path / "not" / "there" / "yet"
    assert free_bytes(folder) == 3_000_000
    check_space(folder, [Need("adapter", 1_000_000), Need("checkpoints", 2_000_000)], "free some")
    needs = [Need("adapter", 1_000_000), Need("best/", 0), Need("checkpoints", 2_000_001)]
    with pytest.raises(UserError) as refused:
        check_space(folder, needs, "free some")
    assert str(refused.value) == (
        f"{folder} needs room for 3.0 MB (1.0 MB adapter, 2.0 MB checkpoints), and its disk has "
        "3.0 MB free; free some"
    )


def test_the_disk_of_a_folder_is_that_of_the_nearest_above(tmp_path: Path) -> None:
    assert on_one_disk(tmp_path / "a" / "b", tmp_path / "c")
    assert not on_one_disk(tmp_path / "a", Path("/proc/not/there"))
