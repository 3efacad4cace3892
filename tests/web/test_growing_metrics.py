"""metrics.jsonl read bit by bit: the same reports as from the whole file, and only new bytes."""

import json
import random
from contextlib import contextmanager
from pathlib import Path

import pytest

from swlora.metrics_file import METRICS, append_metrics, read_metrics, truncate_metrics
from swlora.web import growing_metrics
from swlora.web.growing_metrics import CHECKED_BYTES, GrowingMetrics, MetricsFiles


def report(step: int) -> dict[str, float]:
    held_out = {"eval_nll": 2.0 + step} if step % 7 == 0 else {}
    return {"step": step, "loss": 1.0 / (1 + step), **held_out}


def append(folder: Path, first: int, n: int) -> None:
    folder.mkdir(exist_ok=True)
    for step in range(first, first + n):
        append_metrics(folder, report(step))


def in_parts(metrics: GrowingMetrics, n: int) -> list[dict[str, float]]:
    found, since = [], 0
    while True:
        rows, following = metrics.part(since, n)
        if following == since:
            return found
        found, since = found + rows, following


@pytest.mark.parametrize("seed", range(12))
def test_it_is_what_the_whole_file_says_whatever_happens_to_it(seed, tmp_path, monkeypatch):
    monkeypatch.setattr(growing_metrics, "BLOCK_BYTES", 37)
    monkeypatch.setattr(growing_metrics, "MARK_EVERY", 3)
    drawn, metrics, path, n = random.Random(seed), GrowingMetrics(tmp_path), tmp_path / METRICS, 0
    assert metrics.shown() == [] and metrics.part(0, 10) == ([], 0)
    for _ in range(40):
        what = drawn.choice(["append", "append", "append", "torn", "damage", "resume", "cut"])
        if what == "append":
            n_new = drawn.randrange(1, 9)
            append(tmp_path, n, n_new)
            n += n_new
        elif what == "torn" and n:
            with path.open("ab") as file:
                file.write(b'{"step": 5, "lo' + drawn.choice([b"", b"\n"]))
        elif what == "damage" and n:
            line = json.dumps(report(n)).encode() + b"\n"
            with path.open("ab") as file:
                file.write(line.replace(b"loss", b"lost"))
        elif what == "resume" and n:
            n = drawn.randrange(n)
            truncate_metrics(tmp_path, n - 1)
        elif what == "cut" and n:
            content = path.read_bytes()
            path.write_bytes(content[: drawn.randrange(len(content) + 1)])
        whole = read_metrics(tmp_path)
        assert metrics.shown() == whole
        assert in_parts(metrics, drawn.randrange(1, 20)) == whole


def test_a_file_that_was_rewritten_in_its_place_is_read_anew(tmp_path):
    append(tmp_path, 0, 5)
    metrics = GrowingMetrics(tmp_path)
    assert metrics.shown() == read_metrics(tmp_path)
    append(tmp_path / "other", 100, 9)
    inode = (tmp_path / METRICS).stat().st_ino
    (tmp_path / METRICS).write_bytes((tmp_path / "other" / METRICS).read_bytes())
    assert (tmp_path / METRICS).stat().st_ino == inode
    assert metrics.shown() == read_metrics(tmp_path) == [report(100 + k) for k in range(9)]
    (tmp_path / METRICS).unlink()
    assert metrics.shown() == [] and metrics.part(0, 9) == ([], 0)


def test_of_a_long_file_every_nth_report_is_shown_and_the_newest(tmp_path, monkeypatch):
    monkeypatch.setattr(growing_metrics, "MAX_STEPS", 10)
    monkeypatch.setattr(growing_metrics, "MAX_HELD_OUT", 4)
    metrics = GrowingMetrics(tmp_path)
    for n in range(1, 150):
        append(tmp_path, n - 1, 1)
        stride = next(s for s in (1, 2, 4, 8, 16) if -(-n // s) <= 10)
        held_out = range(0, n, 7)
        stride_held_out = next(s for s in (1, 2, 4, 8) if -(-len(held_out) // s) <= 4)
        expected = {*range(0, n, stride), *held_out[::stride_held_out], n - 1}
        assert metrics.shown() == [report(step) for step in sorted(expected)]
    assert GrowingMetrics(tmp_path).shown() == metrics.shown()


def test_only_what_is_new_is_read(tmp_path, monkeypatch):
    metrics, path = GrowingMetrics(tmp_path), tmp_path / METRICS
    read = count_bytes(monkeypatch)
    append(tmp_path, 0, 2_000)
    assert len(metrics.shown()) == 2_000
    assert path.stat().st_size <= sum(read) <= path.stat().st_size + CHECKED_BYTES
    read.clear()
    assert len(metrics.shown()) == 2_000 and metrics.part(2_000, 10) == ([], 2_000)
    assert sum(read) == 0
    before = path.stat().st_size
    append(tmp_path, 2_000, 3)
    assert metrics.shown()[-1] == report(2_002)
    assert sum(read) <= path.stat().st_size - before + 2 * CHECKED_BYTES
    read.clear()
    assert metrics.part(1_999, 2) == ([report(1_999), report(2_000)], 2_001)
    assert sum(read) < 0.6 * path.stat().st_size  # from the thousandth line on


def count_bytes(monkeypatch) -> list[int]:
    """Note the number of bytes of every read."""
    plain, read = growing_metrics.regular_file, []

    class Counting:
        def __init__(self, file):
            self.seek, self.fileno, self._file = file.seek, file.fileno, file

        def read(self, n: int) -> bytes:
            content = self._file.read(n)
            read.append(len(content))
            return content

    @contextmanager
    def counted(path, **how):
        with plain(path, **how) as file:
            yield Counting(file)

    monkeypatch.setattr(growing_metrics, "regular_file", counted)
    return read


def test_a_line_out_of_all_proportion_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(growing_metrics, "MAX_LINE_BYTES", 300)
    append(tmp_path, 0, 2)
    with (tmp_path / METRICS).open("ab") as file:
        file.write(b"[" * 5_000 + b"\n")
    append(tmp_path, 2, 2)
    metrics = GrowingMetrics(tmp_path)
    assert metrics.shown() == in_parts(metrics, 3) == [report(step) for step in range(4)]


def test_the_folders_that_were_asked_for_last_are_known(tmp_path):
    files = MetricsFiles(max_folders=2)
    first = files.of(tmp_path / "a")
    assert files.of(tmp_path / "b") and files.of(tmp_path / "a") is first
    assert files.of(tmp_path / "c") and files.of(tmp_path / "a") is first
    again = files.of(tmp_path / "b")
    assert again is files.of(tmp_path / "b")
    assert files.of(tmp_path / "a") is first and len(files._known) == 2
