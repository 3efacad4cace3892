"""Rows that are kept in a file are the rows; memory does not grow with their text."""

import errno
import gc
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.chat_templates import chat

from swlora.config import DataSpec
from swlora.data import examples as examples_module
from swlora.data import scratch
from swlora.data.dataset import number_prompts
from swlora.data.examples import Example, Message, StoredExamples, keep, select
from swlora.data.sources import load_dataset
from swlora.errors import DataError, RunFailedError

ROWS = [
    Example("one", "Zwei. “€” \U0001f600\u2028\n\ttab"),
    chat((("system", "s"), ("user", "ü")), "last answer"),
    Example(" prompt ", "\x1f"),
    *(Example(f"prompt {i // 3}", f"completion {i}") for i in range(20)),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def limit(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    monkeypatch.setattr(scratch, "MEMORY_BYTES", n_bytes)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
turns = st.builds(Message, texts, texts, st.none() | st.floats(0, 9), texts)
any_example = st.one_of(
    st.builds(Example, texts, texts, source=texts, number=st.integers(0)),
    st.builds(Example.chat, st.lists(turns, min_size=1, max_size=3), texts),
    st.builds(Example, text=texts),
)


@given(st.lists(any_example, max_size=9), st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_stored_rows_are_a_sequence_like_a_tuple(rows: list[Example], data: st.DataObject) -> None:
    stored, held = StoredExamples.write(rows), tuple(rows)
    assert tuple(stored) == held and len(stored) == len(held)
    assert [row.place for row in stored] == [row.place for row in held]
    part = data.draw(st.slices(len(rows)))
    assert tuple(stored[part]) == held[part]
    assert tuple(stored[part][::-1]) == held[part][::-1]
    ids = np.array(data.draw(st.lists(st.sampled_from(range(len(rows))))) if rows else [], int)
    assert tuple(select(stored, ids)) == select(held, ids) == tuple(rows[i] for i in ids)
    for i in range(-len(rows), len(rows)):
        assert stored[i] == held[i]
    with pytest.raises(IndexError):
        stored[len(rows)]


@pytest.mark.parametrize("limit_bytes", [0, 2000, 100_000])
def test_rows_move_to_a_file_once_their_text_is_long(
    limit_bytes: int, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    limit(monkeypatch, limit_bytes)
    rows = keep(iter(ROWS))
    assert isinstance(rows, tuple) == (limit_bytes == 100_000)
    assert tuple(rows) == tuple(ROWS)
    assert not cache.exists() or list(cache.iterdir()) == [], "the file has a name"


def test_many_rows_are_written_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples_module, "_WRITE_BYTES", 100)
    assert tuple(StoredExamples.write(ROWS)) == tuple(ROWS)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "e2e"])
@pytest.mark.parametrize(
    "limits", [{}, {"train_rows": 5}, {"train_prompts": 3, "eval_prompts": 2}], ids=str
)
def test_a_data_set_is_the_same_wherever_its_rows_lie(
    kind: str, limits: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Prompts come again after others, so that "the last distinct ones" are not the last rows.
    rows = [(f"prompt {i % 23}", f"completion {i}") for i in range(60)]
    if kind == "jsonl":
        path = tmp_path / "rows.jsonl"
        lines = [json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows]
        path.write_text("".join([*lines[:30], "broken\n", *lines[30:]]))
    elif kind == "csv":
        path = tmp_path / "rows.csv"
        path.write_text("completion,prompt\n" + "".join(f'"{c}","{p}"\n' for p, c in rows))
    else:
        path = tmp_path / "e2e"
        path.mkdir()
        for name in ("trainset.csv", "devset.csv", "testset_w_refs.csv"):
            (path / name).write_text("mr,ref\n" + "".join(f"{p},{c}\n" for p, c in rows))
    spec = DataSpec(name=str(path), skip_bad_rows=True, **limits)
    held = load_dataset(spec)
    limit(monkeypatch, 10)
    stored = load_dataset(spec)
    assert isinstance(held.train, tuple) and isinstance(stored.train, StoredExamples)
    for name in ("train", "dev", "test"):
        assert tuple(getattr(stored, name)) == tuple(getattr(held, name))
    for name in ("name", "source", "separator", "counts", "sha256"):
        assert getattr(stored, name) == getattr(held, name)


def test_memory_does_not_grow_with_the_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for i in range(4000):
            file.write(json.dumps({"prompt": f"{i:05} " * 800, "completion": "c"}) + "\n")
    assert path.stat().st_size > 19_000_000
    limit(monkeypatch, 1_000_000)
    tracemalloc.start()
    dataset = load_dataset(DataSpec(name=str(path)))
    n_characters = sum(len(example.prompt) for example in dataset.train)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_characters == 3800 * 4800
    assert peak_bytes < 6_000_000


def test_a_full_disk_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    limit(monkeypatch, 10)

    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    message = f"cannot keep the rows in {cache}: No space left on device; SWLORA_CACHE names"
    with pytest.raises(RunFailedError, match=message):
        keep(ROWS)


def test_a_folder_that_cannot_be_made_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit(monkeypatch, 10)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SWLORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(RunFailedError, match=r"cannot keep the rows in .*file: "):
        keep(ROWS)


def test_an_error_of_the_source_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 10)

    def broken() -> Iterator[Example]:
        yield from ROWS
        raise OSError(errno.EIO, "the source broke")

    with pytest.raises(OSError, match="the source broke"):
        keep(broken())


@pytest.mark.parametrize("n_bytes", [1 << 20, 1000])
def test_cycles_are_not_searched_for_while_examples_gather_in_memory(
    n_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, n_bytes)
    seen: list[bool] = []

    def rows() -> Iterator[Example]:
        for row in ROWS:
            seen.append(gc.isenabled())
            yield row
        raise DataError("the end")

    assert gc.isenabled()
    with pytest.raises(DataError, match="the end"):
        keep(rows())
    assert gc.isenabled() and not seen[0] and seen[-1] == (n_bytes == 1000)


def test_the_completion_of_a_chat_is_what_the_assistant_says_last() -> None:
    asked, call = Message("user", "hi"), Message("assistant", "", extra='{"tool_calls": [1]}')
    for last, said in ((Message("assistant", "ja", extra='{"a": 1}'), "ja"), (call, call.extra)):
        example = Example.chat([asked, last])
        assert (example.completion, example.prompt_messages) == (said, (asked,))
    example = Example.chat([asked, call, asked])
    assert (example.completion, example.prompt_messages) == ("", (asked, call, asked))
    with pytest.raises(ValueError, match="one turn or more"):
        Example.chat([])


def test_an_answer_of_weight_0_is_no_completion() -> None:
    """A chat is asked where the last answer stands that may be learnt from."""
    asked, good, bad = (
        Message("user", "hi"),
        Message("assistant", "hello", trained=1.0),
        Message("assistant", "go away", trained=0.0),
    )
    for turns in ((asked, good, asked, bad), (asked, good, bad), (asked, good)):
        example = Example.chat(turns)
        assert (example.completion, example.prompt_messages) == ("hello", (asked,))
        assert example.messages == turns
    example = Example.chat([asked, bad, asked, good])
    assert (example.completion, example.prompt_messages) == ("hello", (asked, bad, asked))
    assert Example.chat([asked, bad]).prompt_messages == (asked,)  # nothing else to ask for


def test_prompts_are_told_apart_by_all_that_is_shown() -> None:
    turn = Message("user", "hi")
    rows = [
        Example("hi", "1"),
        Example.chat([turn, Message("assistant", "2")]),
        Example.chat([turn]),
        Example.chat([turn], tools="[]"),
        Example.chat([Message("user", "hi", extra='{"name": "Ann"}')]),
        Example.chat([Message("system", "hi")]),
        Example(text="hi"),
    ]
    assert number_prompts(rows).tolist() == [0, 1, 1, 2, 3, 4, 5]


def test_rows_are_numbered_by_their_distinct_prompt() -> None:
    rows = [Example("a", "1"), Example("b", "2"), Example("a", "3"), chat((("user", "hi"),), "4")]
    assert number_prompts(rows).tolist() == [0, 1, 0, 2]


def test_a_chat_comes_back_from_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "ü?"}, {"role": "assistant", "content": "ja"}]
    other = [{"role": "user", "content": "no?"}, *turns[1:]]
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (turns, other)))
    held = load_dataset(DataSpec(name=str(path)))
    limit(monkeypatch, 0)
    stored = load_dataset(DataSpec(name=str(path)))
    assert tuple(stored.train) == held.train == (chat((("user", "ü?"),), "ja"),)
    assert stored.sha256 == held.sha256


def test_after_a_bad_row_nothing_is_kept_but_all_is_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit(monkeypatch, 0)
    monkeypatch.setattr(StoredExamples, "write", pytest.fail)
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "p", "completion": "c"}) + "\n"
    path.write_text("broken\n" + 20 * good + "broken\n")
    with pytest.raises(DataError, match=r"line 1: not valid JSON.* and 1 more"):
        load_dataset(DataSpec(name=str(path)))


def test_a_file_that_cannot_be_read_back_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = StoredExamples.write(ROWS)
    monkeypatch.setattr(os, "pread", lambda *_: b"[")
    with pytest.raises(RunFailedError, match=r"cannot keep the rows .* shorter than it was"):
        stored[0]
