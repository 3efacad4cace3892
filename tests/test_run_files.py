"""The metrics and snapshots of a run: torn lines, damage and full disks are seen."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from swlora import files
from swlora.config import RunSpec
from swlora.errors import RunFailedError
from swlora.metrics_file import read_metrics
from swlora.runs import Run
from swlora.snapshots import (
    OLD_MANIFEST,
    Snapshot,
    load_snapshot,
    remove_other_snapshots,
    save_snapshot,
)


def start(folder: Path) -> Run:
    return Run.create(folder, RunSpec(), "train")


# Metrics


def test_metrics_are_lines(tmp_path):
    run = start(tmp_path)
    assert read_metrics(tmp_path) == []
    rows = [{"step": k, "loss": 1 / k} for k in range(1, 5)]
    for row in rows:
        run.append_metrics(row)
    assert read_metrics(tmp_path) == rows
    run.truncate_metrics(3)
    assert read_metrics(tmp_path) == rows[:3]
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.append_metrics({"step": 4, "loss": float("nan")})
    assert read_metrics(tmp_path) == rows[:3]


def test_a_torn_line_is_dropped_wherever_it_was_torn(tmp_path):
    run = start(tmp_path)
    rows = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}]
    for row in rows:
        run.append_metrics(row)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert read_metrics(tmp_path) == rows[:1]
        run.truncate_metrics(2)
        run.append_metrics(rows[1])  # what is appended later is not lost behind the tear
        assert read_metrics(tmp_path) == rows


def test_a_flipped_bit_costs_its_line_and_no_other(tmp_path):
    run = start(tmp_path)
    rows = [{"step": step, "loss": 2.5 / step, "note": "ü"} for step in (1, 2, 3)]
    for row in rows:
        run.append_metrics(row)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    first, second = whole.index(b"\n") + 1, whole.index(b"\n", whole.index(b"\n") + 1)
    for place in range(first, second):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 7)
        path.write_bytes(damaged)
        # Harmless: "\\u00FC" is "\\u00fc", and another name for the checksum is one value more.
        found = [{name: row[name] for name in rows[0]} for row in read_metrics(tmp_path)]
        assert found in ([rows[0], rows[2]], rows), damaged


def test_metrics_without_checksums_are_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n[1]\n{"step": 2}\n')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.5}, {"step": 2}]


def test_metrics_on_a_full_disk(tmp_path, monkeypatch):
    run = start(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(RunFailedError, match=r"cannot write .*metrics\.jsonl: No space left"):
        run.append_metrics({"step": 1})


# Snapshots

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3).t(),
    "rng": torch.get_rng_state(),
    "b": torch.tensor(1.5, dtype=torch.bfloat16),
}
VALUES = {"step": 3, "elapsed_s": 0.1 + 0.2, "none": None}


FIRST = Snapshot(1, TENSORS, VALUES)


def other(number: int) -> Snapshot:
    return Snapshot(number, {"a": torch.full((1,), float(number))}, {"step": number})


def loaded(folder: Path) -> Snapshot | None:
    """The snapshot of a folder, of which there is nothing to say."""
    said: list[str] = []
    found = load_snapshot(folder, said.append)
    assert said == []
    return found


def same(found: Snapshot | None, expected: Snapshot = FIRST) -> bool:
    assert found is not None
    names = expected.tensors.keys()
    return (
        (found.number, found.values) == (expected.number, expected.values)
        and found.tensors.keys() == names
        and all(torch.equal(found.tensors[n], expected.tensors[n]) for n in names)
        and all(found.tensors[n].dtype == expected.tensors[n].dtype for n in names)
    )


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def files_of(*numbers: int) -> list[str]:
    return [f"state-{n}.{end}" for n in numbers for end in ("json", "safetensors")]


def test_a_snapshot_comes_back_and_is_replaced(tmp_path):
    folder = tmp_path / "c"
    assert loaded(folder) is None
    save_snapshot(folder, FIRST)
    assert same(loaded(folder))
    save_snapshot(folder, other(2))
    assert same(loaded(folder), other(2))
    assert files_in(folder) == files_of(2)


def test_as_many_are_kept_as_were_asked_for(tmp_path):
    for number in range(1, 6):
        save_snapshot(tmp_path, other(number), keep=3)
    assert files_in(tmp_path) == files_of(3, 4, 5)
    (tmp_path / "notes.txt").write_text("mine")
    save_snapshot(tmp_path, other(6), keep=1)
    assert files_in(tmp_path) == ["notes.txt", *files_of(6)]


@pytest.mark.parametrize("damage", ["data", "data gone", "manifest", "manifest gone"])
def test_the_one_before_a_damaged_one_is_taken_and_the_reason_said(damage, tmp_path):
    for number in (1, 2):
        save_snapshot(tmp_path, other(number), keep=2)
    path = tmp_path / f"state-2.{'json' if 'manifest' in damage else 'safetensors'}"
    if "gone" in damage:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3])
    said: list[str] = []
    assert same(load_snapshot(tmp_path, said.append), other(1))
    if damage == "manifest gone":  # it was never complete
        assert said == []
    else:
        assert len(said) == 1 and "state-2" in said[0] and "an older one is taken" in said[0]
    save_snapshot(tmp_path, other(2), keep=2)  # done again; the damaged one is no more
    assert files_in(tmp_path) == files_of(1, 2)
    assert same(loaded(tmp_path), other(2))


def test_a_snapshot_of_an_older_version_is_loaded(tmp_path):
    save_snapshot(tmp_path, other(4))
    (tmp_path / "state-4.json").rename(tmp_path / "manifest.json")
    assert same(loaded(tmp_path), other(4))
    save_snapshot(tmp_path, other(5), keep=2)
    assert same(loaded(tmp_path), other(5))
    assert files_in(tmp_path) == ["state-4.safetensors", *files_of(5)]


@pytest.mark.parametrize("kill_at", ["data", "manifest", "removal"])
def test_a_kill_while_saving_leaves_a_whole_snapshot(kill_at, tmp_path, monkeypatch):
    folder = tmp_path / "c"
    save_snapshot(folder, FIRST)
    replaced: list[Path] = []
    replace = Path.replace

    def dying_replace(path: Path, target: Path) -> None:
        replaced.append(target)
        if len(replaced) == {"data": 1, "manifest": 2}.get(kill_at):
            raise SystemExit
        replace(path, target)

    def dying_unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("state-"):
            raise SystemExit
        if path.exists():
            path.rename(tmp_path / "gone")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Path, "replace", dying_replace)
        if kill_at == "removal":
            patch.setattr(Path, "unlink", dying_unlink)
        save_snapshot(folder, other(2))
    assert same(loaded(folder), other(2) if kill_at == "removal" else FIRST)
    save_snapshot(folder, other(3))
    assert same(loaded(folder), other(3))
    assert files_in(folder) == files_of(3)


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error: No space left"), OSError(28, "No space")]
)
def test_a_full_disk_keeps_the_old_snapshot(error, tmp_path, monkeypatch):
    save_snapshot(tmp_path, FIRST)

    def full(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch, pytest.raises(RunFailedError, match="No space") as failed:
        patch.setattr("safetensors.torch.save_file", full)
        save_snapshot(tmp_path, other(2))
    assert len(str(failed.value).splitlines()) == 1
    assert same(loaded(tmp_path))
    assert files_in(tmp_path) == files_of(1)


@pytest.mark.parametrize("name", ["state-0.json", OLD_MANIFEST])
def test_an_old_snapshot_that_cannot_be_removed_says_what_to_do(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(RunFailedError, match=f"cannot remove .*{name}: .*go on with --resume$"):
        save_snapshot(tmp_path, FIRST)


def test_a_disk_that_fails_says_so(tmp_path, monkeypatch):
    run = start(tmp_path)
    run.append_metrics({"step": 1})
    save_snapshot(run.checkpoint, FIRST)

    def fail(_descriptor: int) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(RunFailedError, match=r"cannot write .*metrics\.jsonl: I/O error"):
        run.sync()
    with pytest.raises(RunFailedError, match=r"cannot remove .* for good: I/O error; .*--resume$"):
        remove_other_snapshots(run.checkpoint, 2, keep=1)


def test_every_flipped_bit_and_every_cut_of_the_data_is_seen(tmp_path):
    save_snapshot(tmp_path, FIRST)
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    for k in range(0, len(whole), len(whole) // 20):
        flipped = bytearray(whole)
        flipped[k] ^= 1 << k % 8
        for damaged in (bytes(flipped), whole[:k]):
            path.write_bytes(damaged)
            with pytest.raises(RunFailedError, match="is damaged"):
                loaded(tmp_path)
    path.unlink()
    with pytest.raises(RunFailedError, match="is damaged"):
        loaded(tmp_path)


def test_a_flipped_bit_of_the_manifest_never_changes_what_is_loaded(tmp_path):
    save_snapshot(tmp_path, FIRST)
    path = tmp_path / "state-1.json"
    whole = path.read_bytes()
    n_seen = 0
    for k in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[k] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                assert same(loaded(tmp_path))  # white space, or a letter of JSON's own
            except RunFailedError:
                n_seen += 1
    assert n_seen > 7 * len(whole)


def test_runs_use_the_same_atomic_files(tmp_path, monkeypatch):
    run = start(tmp_path)
    before = (tmp_path / "run.json").read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(RunFailedError, match=r"cannot write .*run\.json: No space left on device"):
        run.record(n=1)
    assert (tmp_path / "run.json").read_bytes() == before
