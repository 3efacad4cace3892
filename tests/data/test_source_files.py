"""JSONL and CSV files: text comes through untouched, bad rows are named or counted."""

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.data_files import as_csv, as_jsonl, examples, numbered, write, write_e2e

from swlora.config import DataSpec
from swlora.data.examples import Example
from swlora.data.sources import load_dataset
from swlora.errors import DataError, UserError

pytestmark = pytest.mark.usefixtures("no_settings_from_outside")


@pytest.mark.parametrize(("n_prompts", "n_dev"), [(2, 1), (3, 1), (39, 1), (40, 2), (67, 3)])
def test_the_last_distinct_prompts_are_held_out(tmp_path: Path, n_prompts: int, n_dev: int):
    rows = numbered(n_prompts)
    dataset = load_dataset(DataSpec(name=write(tmp_path / "rows.jsonl", as_jsonl(rows))))
    held_out = {f"prompt {i}" for i in range(n_prompts - n_dev, n_prompts)}
    assert dataset.dev == examples([row for row in rows if row[0] in held_out])
    assert dataset.train == examples([row for row in rows if row[0] not in held_out])
    assert f"its last {n_dev} of {n_prompts} distinct prompts" in dataset.source
    assert (dataset.name, dataset.separator, dataset.test) == ("rows.jsonl", "", ())
    with pytest.raises(UserError, match="has no test split; use --split dev"):
        dataset.split("test")
    with pytest.raises(UserError, match="no split is called 'valid'"):
        dataset.split("valid")


def test_one_prompt_cannot_be_held_out(tmp_path: Path):
    name = write(tmp_path / "rows.jsonl", as_jsonl([("p", "a"), ("p", "b")]))
    with pytest.raises(UserError, match=r"one distinct prompt.*give --eval-file"):
        load_dataset(DataSpec(name=name))


def test_an_evaluation_file_is_dev_and_test(tmp_path: Path):
    rows, others = numbered(2), [("q", "x"), ("q", "y"), ("r", "z")]
    name = write(tmp_path / "rows.jsonl", as_jsonl(rows))
    write(tmp_path / "eval.CSV", as_csv([("completion", "prompt"), *((c, p) for p, c in others)]))
    dataset = load_dataset(DataSpec(name=name, eval_file=tmp_path / "eval.CSV"))
    assert dataset.train == examples(rows)
    assert dataset.dev == dataset.test == examples(others)
    assert "eval.CSV" in dataset.source
    with pytest.raises(UserError, match=r"must be one of \.jsonl, "):
        load_dataset(DataSpec(name=name, eval_file=tmp_path / "eval.docx"))


def test_columns_can_be_named(tmp_path: Path):
    rows = [("id", "question", "answer"), ("1", "one?", "1!"), ("2", "two?", "2!")]
    name = write(tmp_path / "rows.csv", as_csv(rows))
    spec = DataSpec(name=name, prompt_column="question", completion_column="answer")
    assert load_dataset(spec).train == (Example("one?", "1!"),)
    assert load_dataset(DataSpec(name=name, columns="prompt=question, completion=answer")).train
    found = "'id', 'question', 'answer'"
    remedy = "--columns, such as prompt=question,completion=answer"
    unknown = rf"its columns are of no known form: {found}; the nearest forms have .*; .*; .*"
    with pytest.raises(DataError, match=rf"rows.csv: {unknown}; name yours with {remedy}$"):
        load_dataset(DataSpec(name=name, skip_bad_rows=True))
    with pytest.raises(DataError, match=rf"no column 'gone'; columns found: {found}$"):
        load_dataset(spec.model_copy(update={"completion_column": "gone"}))
    name = write(tmp_path / "rows.jsonl", b'{"question": "one?", "answer": "1!"}\n')
    with pytest.raises(DataError, match=rf"rows.jsonl, line 1: .*{remedy}; --skip-bad-rows leaves"):
        load_dataset(DataSpec(name=name))
    write_e2e(tmp_path / "e2e")
    write(tmp_path / "e2e" / "devset.csv", as_csv(rows))
    with pytest.raises(DataError, match=rf"no column 'mr'; columns found: {found}$"):
        load_dataset(DataSpec(name=str(tmp_path / "e2e")))


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
ROWS = st.lists(st.tuples(TEXT, TEXT).filter(lambda r: all(t.strip() for t in r)), max_size=6)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=ROWS, newline=st.sampled_from(["\n", "\r\n"]))
def test_any_text_comes_through_and_lines_are_physical(tmp_path: Path, rows, newline):
    rows = [*rows, ("last but one", "x"), ("last", "y")]
    table = as_csv([("prompt", "completion"), *rows], newline)
    name = write(tmp_path / "rows.csv", table)
    dataset = load_dataset(DataSpec(name=name))
    assert sorted(dataset.train + dataset.dev, key=repr) == sorted(examples(rows), key=repr)
    other = load_dataset(DataSpec(name=write(tmp_path / "rows.jsonl", as_jsonl(rows))))
    assert (other.train, other.dev, other.sha256) == (dataset.train, dataset.dev, dataset.sha256)

    write(tmp_path / "rows.csv", table + b'"",no prompt' + newline.encode())
    line = len(re.findall("\r\n|\r|\n", table.decode())) + 1
    with pytest.raises(DataError, match=rf"rows\.csv, line {line}: its prompt is empty"):
        load_dataset(DataSpec(name=name))


def test_a_byte_order_mark_and_blank_lines_are_no_rows(tmp_path: Path):
    rows = numbered(2)
    for name, content in {
        "rows.csv": as_csv([("prompt", "completion"), *rows[:1]]) + b"\r\n" + as_csv(rows[1:]),
        "rows.jsonl": as_jsonl(rows[:1]) + b"\n  \r\n" + as_jsonl(rows[1:]).rstrip(b"\n"),
    }.items():
        dataset = load_dataset(DataSpec(name=write(tmp_path / name, b"\xef\xbb\xbf" + content)))
        assert len(dataset.train + dataset.dev) == 4


# Bad rows

GOOD = b'{"prompt": "p", "completion": "c"}\n{"prompt": "q", "completion": "d"}\n'
BAD_JSON = {
    b"{nonsense}": "not valid JSON",
    b"[" * 100_000: "not valid JSON",
    b'["p", "c"]': "not a JSON object",
    b'{"prompt": "p", "text": "c"}': "no known form: 'prompt', 'text'; the nearest forms have",
    b"{}": "its columns are of no known form: none",
    b'{"prompt": 3, "completion": "c"}': "prompt is not a string",
    b'{"prompt": "p", "completion": null}': "completion is not a string",
    b'{"prompt": " \\n", "completion": "c"}': "prompt is empty",
    b'{"prompt": "p", "completion": ""}': "completion is empty",
    b'{"prompt": "\xff", "completion": "c"}': "not valid UTF-8",
    b'{"prompt": "\\ud800", "completion": "c"}': "prompt is not valid UTF-8",
    b'{"prompt": "p\\u0000", "completion": "c"}': "prompt holds a NUL",
    b'{"prompt": "p\0", "completion": "c"}': "not valid JSON",
    b'{"messages": "hello"}': "not a list of two turns",
    b'{"messages": [{"role": "assistant", "content": "a"}]}': "not a list of two turns",
    b'{"messages": ["a", "b"]}': "has the role None, not one of system",
    b'{"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]}': (
        "message of the tool stands before the first answer"
    ),
    b'{"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "b"}]}': (
        "content of a message of the user is not a string"
    ),
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}': (
        "last message is not the assistant's"
    ),
    b'{"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "b"}]}': (
        "prompt is empty"
    ),
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}': (
        "an answer of the assistant is empty"
    ),
}
BAD_CSV = {
    b"p": "has 1 field, the header 2",
    b"p,a,b": "has 3 fields, the header 2",
    b',"c"': "prompt is empty",
    b'p,"\n "': "completion is empty",
    b"p,\xe9t\xe9": "completion is not valid UTF-8",
    b"p\0,c": "prompt holds a NUL",
}


@pytest.mark.parametrize(
    ("suffix", "head", "bad", "reason"),
    [(".jsonl", GOOD, bad, reason) for bad, reason in BAD_JSON.items()]
    + [(".csv", b'prompt,completion\np,"a\nb"\nq,r\n', *item) for item in BAD_CSV.items()],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_bad_rows_are_named_or_counted(tmp_path: Path, suffix, head, bad, reason):
    name = write(tmp_path / f"rows{suffix}", head + bad + b"\n" + head.split(b"\n", 1)[1])
    line = head.count(b"\n") + 1
    message = rf"rows{suffix}, line {line}: .*{re.escape(reason)}.*; --skip-bad-rows leaves it out"
    with pytest.raises(DataError, match=message):
        load_dataset(DataSpec(name=name))
    dataset = load_dataset(DataSpec(name=name, skip_bad_rows=True))
    kept = load_dataset(
        DataSpec(name=write(tmp_path / f"good{suffix}", head + head.split(b"\n", 1)[1]))
    )
    assert (dataset.counts.n_bad, kept.counts.n_bad) == (1, 0)
    assert dataset.sha256 == kept.sha256


def test_the_first_bad_row_is_named_and_all_are_counted(tmp_path: Path):
    content = GOOD + b"{\n" + GOOD + b"[]\n3\nnull\n"
    name = write(tmp_path / "rows.jsonl", content)
    with pytest.raises(DataError, match=r"line 3: not valid.*; and 3 more; --skip-bad-rows leaves"):
        load_dataset(DataSpec(name=name))
    spec = DataSpec(name=name, eval_file=Path(name), skip_bad_rows=True)
    assert load_dataset(spec).counts.n_bad == 8  # four in each of the two files named


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no usable row: .*line 1: the file holds no rows"),
        (b"prompt;completion\np;c\n", "has ';' between its columns.*write commas"),
        (b"prompt,completion,prompt\np,c,p\n", "has two columns 'prompt': rename one"),
        ("prompt,completion\np,c\n".encode("utf-16"), "is UTF-16, or no text"),
        (b'prompt,completion\na,b\n"p,c\nq,d\n', "line 3: not valid CSV: unexpected end"),
        (b'prompt,completion\n"p" x,c\n', "line 2: not valid CSV"),
        (b"prompt,completion\n", "no usable row"),
        (b"prompt,completion\n,\n,\n", "no usable row: .*line 2: its prompt is empty"),
    ],
)
def test_a_broken_csv_is_an_error_even_where_rows_may_be_skipped(tmp_path, content, reason):
    name = write(tmp_path / "rows.csv", content)
    with pytest.raises(DataError, match=reason) as caught:
        load_dataset(DataSpec(name=name, skip_bad_rows=True))
    str(caught.value).encode()  # can be printed
