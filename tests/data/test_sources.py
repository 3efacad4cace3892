"""Sources: text comes through untouched, bad rows are named or counted, fallbacks are said."""

import csv
import io
import json
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swlora.config import DEFAULT_DATASET, DataSpec
from swlora.data import sources
from swlora.data.sample import make_sample
from swlora.data.sources import Example, HubUnreachableError, group_references, load_dataset
from swlora.errors import DataError, UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
E2E = {
    "trainset.csv": [("name[A], food[x]", "A, with “x”."), ("name[B]", " B\nis here.")],
    "devset.csv": [("name[C]", "C."), ("name[D]", "D."), ("name[C]", "See C.")],
    "testset_w_refs.csv": [("name[É]", "É."), ("name[F]", "F."), ("name[F]", "Eff.")],
}


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SWLORA_E2E", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def as_csv(rows: list[tuple[str, ...]], newline: str = "\r\n") -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=newline, quoting=csv.QUOTE_ALL).writerows(rows)
    return text.getvalue().encode()


def as_jsonl(rows: list[tuple[str, str]]) -> bytes:
    return b"".join(
        json.dumps({"prompt": p, "completion": c}, ensure_ascii=False).encode() + b"\n"
        for p, c in rows
    )


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def write_e2e(folder: Path) -> str:
    folder.mkdir()
    for name, rows in E2E.items():
        write(folder / name, as_csv([("mr", "ref"), *rows]))
    return str(folder)


def examples(rows: list[tuple[str, str]]) -> tuple[Example, ...]:
    return tuple(Example(*row) for row in rows)


# E2E folders, names and splits


def test_an_e2e_folder_is_read_word_for_word(tmp_path: Path):
    folder = write_e2e(tmp_path / "e2e")
    dataset = load_dataset(DataSpec(name=folder))
    assert dataset.train == examples(E2E["trainset.csv"])
    assert dataset.dev == dataset.split("dev") == examples(E2E["devset.csv"])
    assert dataset.test == dataset.split("test") == examples(E2E["testset_w_refs.csv"])
    assert (dataset.name, dataset.separator, dataset.n_skipped_rows) == ("E2E NLG", "\n", 0)
    assert dataset.source == f"E2E NLG from the folder {folder}"


def test_the_real_e2e(shared_dir: Path):
    dataset = load_dataset(DataSpec(name=str(shared_dir / "e2e-dataset")))
    for split, (name, n_rows, n_prompts) in {
        "train": ("trainset.csv", 42061, 4862),
        "dev": ("devset.csv", 4672, 547),
        "test": ("testset_w_refs.csv", 4693, 630),
    }.items():
        with (shared_dir / "e2e-dataset" / name).open(encoding="utf-8", newline="") as file:
            expected = [(row["mr"], row["ref"]) for row in csv.DictReader(file)]
        rows = dataset.split(split)
        assert [(e.prompt, e.completion) for e in rows] == expected
        assert (len(rows), len(group_references(rows))) == (n_rows, n_prompts)
    assert sum(sources.HUB_ROWS.values()) == 42061 + 4672 + 4693


def test_a_folder_that_is_not_e2e_is_refused(tmp_path: Path):
    folder = write_e2e(tmp_path / "e2e")
    (tmp_path / "e2e" / "devset.csv").unlink()
    with pytest.raises(UserError, match=r"has no devset\.csv, so"):
        load_dataset(DataSpec(name=folder))


@pytest.mark.parametrize("name", ["GEM/e2e_nlg", "missing", "rows.txt", "rows.json"])
def test_another_name_lists_what_is_accepted(name: str):
    with pytest.raises(UserError, match=r"tuetschek/e2e_nlg, sample, a folder with .*\.jsonl or"):
        load_dataset(DataSpec(name=name))


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match=r"cannot read .*gone\.csv: No such file"):
        load_dataset(DataSpec(name=str(tmp_path / "gone.csv")))


def test_the_sample():
    dataset = load_dataset(DataSpec(name="sample"))
    assert (dataset.train, dataset.dev, dataset.test) == tuple(map(examples, make_sample()))
    assert (dataset.name, dataset.separator) == ("sample", "\n")
    assert dataset.source == "the built-in sample (made from a grammar; not E2E)"


@pytest.mark.parametrize("name", ["sample", DEFAULT_DATASET, "folder"])
@pytest.mark.parametrize(
    "option", [{"eval_file": "x.csv"}, {"prompt_column": "mr"}, {"completion_column": "ref"}]
)
def test_options_of_files_are_not_ignored_elsewhere(name: str, option: dict[str, str], tmp_path):
    name = write_e2e(tmp_path / "e2e") if name == "folder" else name
    flag = "--" + next(iter(option)).replace("_", "-")
    with pytest.raises(UserError, match=f"{flag} is for JSONL and CSV"):
        load_dataset(DataSpec(name=name, **option))


# JSONL and CSV files


def numbered(n_prompts: int) -> list[tuple[str, str]]:
    """Two rows for each prompt, the second ones in another order."""
    first = [(f"prompt {i}", f"first {i}") for i in range(n_prompts)]
    return first + [(f"prompt {i}", f"second {i}") for i in reversed(range(n_prompts))]


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
    with pytest.raises(UserError, match=r"must be a \.jsonl or \.csv"):
        load_dataset(DataSpec(name=name, eval_file=tmp_path / "eval.txt"))


def test_columns_can_be_named(tmp_path: Path):
    rows = [("id", "question", "answer"), ("1", "one?", "1!"), ("2", "two?", "2!")]
    name = write(tmp_path / "rows.csv", as_csv(rows))
    spec = DataSpec(name=name, prompt_column="question", completion_column="answer")
    assert load_dataset(spec).train == (Example("one?", "1!"),)
    found = r"columns found: 'id', 'question', 'answer' \(name the right one with"
    with pytest.raises(DataError, match=rf"column 'prompt'; {found} --prompt-column\)$"):
        load_dataset(DataSpec(name=name, skip_bad_rows=True))
    with pytest.raises(DataError, match=rf"column 'completion'; {found} --completion-column\)$"):
        load_dataset(spec.model_copy(update={"completion_column": "completion"}))
    name = write(tmp_path / "rows.jsonl", b'{"question": "one?", "answer": "1!"}\n')
    found = r"only 'question', 'answer' \(name the right one with --prompt-column\); --skip-bad"
    with pytest.raises(DataError, match=rf"line 1: it has no 'prompt', {found}"):
        load_dataset(DataSpec(name=name))
    write_e2e(tmp_path / "e2e")
    write(tmp_path / "e2e" / "devset.csv", as_csv(rows))
    with pytest.raises(DataError, match=r"column 'mr'; columns found: 'id', 'question', 'answer'$"):
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
    b'{"prompt": "p", "text": "c"}': "no 'completion', only 'prompt', 'text'",
    b"{}": "no 'prompt', only nothing",
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
        "has the role 'tool'"
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
        "completion is empty"
    ),
}
BAD_CSV = {
    b"p": "has 1 fields, the header 2",
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
    assert (dataset.n_skipped_rows, kept.n_skipped_rows) == (1, 0)
    assert dataset.sha256 == kept.sha256


def test_the_first_bad_row_is_named_and_all_are_counted(tmp_path: Path):
    content = GOOD + b"{\n" + GOOD + b"[]\n3\nnull\n"
    name = write(tmp_path / "rows.jsonl", content)
    with pytest.raises(DataError, match=r"line 3: not valid.*; and 3 more; --skip-bad-rows leaves"):
        load_dataset(DataSpec(name=name))
    spec = DataSpec(name=name, eval_file=Path(name), skip_bad_rows=True)
    assert load_dataset(spec).n_skipped_rows == 8  # four in each of the two files named


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "needs one column 'prompt'; columns found: none"),
        (b"prompt;completion\np;c\n", "columns found: 'prompt;completion'"),
        (b"prompt,completion,prompt\np,c,p\n", "needs one column 'prompt'"),
        ("prompt,completion\np,c\n".encode("utf-16"), "needs one column 'prompt'"),
        (b'prompt,completion\na,b\n"p,c\nq,d\n', "line 3: not valid CSV: unexpected end"),
        (b'prompt,completion\n"p" x,c\n', "line 2: not valid CSV"),
        (b"prompt,completion\na,b\nc," + b"d" * 200_000, "line 3: not valid CSV: field larger"),
        (b"prompt,completion\n", "no usable row"),
        (b"prompt,completion\n,\n,\n", "no usable row: .*line 2: its prompt is empty"),
    ],
)
def test_a_broken_csv_is_an_error_even_where_rows_may_be_skipped(tmp_path, content, reason):
    name = write(tmp_path / "rows.csv", content)
    with pytest.raises(DataError, match=reason) as caught:
        load_dataset(DataSpec(name=name, skip_bad_rows=True))
    str(caught.value).encode()  # can be printed


# Limits, groups, hash


def test_limits(tmp_path: Path):
    folder = write_e2e(tmp_path / "e2e")
    dataset = load_dataset(DataSpec(name=folder, train_rows=1, eval_prompts=1))
    assert dataset.train == examples(E2E["trainset.csv"][:1])
    assert dataset.dev == examples([("name[C]", "C."), ("name[C]", "See C.")])
    assert dataset.test == examples([("name[É]", "É.")])
    whole = load_dataset(DataSpec(name=folder))
    assert load_dataset(DataSpec(name=folder, train_rows=99, eval_prompts=2)) == whole
    assert len({dataset.sha256, whole.sha256}) == 2


def test_the_first_training_prompts_come_with_all_their_rows(tmp_path):
    rows = [("a", "1"), ("b", "2"), ("a", "3"), ("c", "4"), ("b", "5")]
    path = tmp_path / "rows.csv"
    lines = ["prompt,completion", *(f"{prompt},{text}" for prompt, text in rows)]
    path.write_text("\n".join(lines) + "\n")

    def kept(**limits):
        spec = DataSpec(name=str(path), eval_file=path, **limits)
        return [(e.prompt, e.completion) for e in load_dataset(spec).train]

    assert kept() == rows
    assert kept(train_prompts=1) == [("a", "1"), ("a", "3")]
    assert kept(train_prompts=2) == [("a", "1"), ("b", "2"), ("a", "3"), ("b", "5")]
    assert kept(train_prompts=2, train_rows=2) == [("a", "1"), ("b", "2")]
    assert kept(train_prompts=9) == rows


def test_group_references_keeps_file_order_and_tells_chats_apart():
    chat = (("user", "a"),)
    rows = [Example("b", "1"), Example("a", "2"), Example("b", "3"), Example("", "4", chat)]
    rows += [Example("", "5", (("user", "b"),)), Example("", "6", chat), Example("b", "1")]
    assert group_references(rows) == [
        (rows[0], ["1", "3", "1"]),
        (rows[1], ["2"]),
        (rows[3], ["4", "6"]),
        (rows[4], ["5"]),
    ]
    assert group_references([]) == []


def test_the_hash_is_of_content(tmp_path: Path):
    rows = numbered(3)
    hashes = [
        load_dataset(DataSpec(name=write(tmp_path / f"{i}.jsonl", as_jsonl(changed)))).sha256
        for i, changed in enumerate(
            [rows, rows, rows[::-1], rows[1:], [("prompt 0", "first 0 "), *rows[1:]]]
        )
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4


# The Hub


class Table(dict[str, list[str]]):
    column_names = property(lambda self: list(self))

    def __len__(self) -> int:
        return len(next(iter(self.values())))


def hub_tables() -> dict[str, Table]:
    columns = ("meaning_representation", "human_reference")
    return {
        split: Table(zip(columns, map(list, zip(*rows, strict=True)), strict=True))
        for split, rows in zip(("train", "validation", "test"), E2E.values(), strict=True)
    }


def fake_hub(
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[], str],
    load: Callable[[], dict[str, Table]] = hub_tables,
) -> list[object]:
    """Replace the two Hub libraries; the list returned fills with the calls made."""
    calls: list[object] = []

    class Api:
        def dataset_info(self, *args: object, **options: object) -> object:
            calls.append((args, options))
            return SimpleNamespace(sha=answer())

    def load_dataset(*args: object, **options: object) -> dict[str, Table]:
        calls.append((args, options))
        return load()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(sources, "HUB_ROWS", {"train": 2, "validation": 3, "test": 3})
    return calls


def raising(error: Exception) -> Callable[[], str]:
    def answer() -> str:
        raise error

    return answer


def test_the_hub_is_asked_for_one_commit_of_its_parquet_branch(monkeypatch, tmp_path):
    calls = fake_hub(monkeypatch, lambda: COMMIT)
    dataset = load_dataset(DataSpec())
    branch = {"revision": "refs/convert/parquet", "timeout": 5.0}
    assert calls == [((DEFAULT_DATASET,), branch), ((DEFAULT_DATASET,), {"revision": COMMIT})]
    assert "refs/convert/parquet at 0123456789ab" in dataset.source
    folder = load_dataset(DataSpec(name=write_e2e(tmp_path / "e2e")))
    assert (dataset.train, dataset.dev, dataset.test) == (folder.train, folder.dev, folder.test)
    assert (dataset.name, dataset.sha256) == (folder.name, folder.sha256)


@pytest.mark.parametrize(
    "change",
    [
        lambda tables: tables.pop("validation"),
        lambda tables: tables["test"].pop("human_reference"),
        lambda tables: [column.append("more") for column in tables["train"].values()],
    ],
)
def test_other_data_under_its_name_is_refused(monkeypatch, change):
    tables = hub_tables()
    change(tables)
    fake_hub(monkeypatch, lambda: COMMIT, lambda: tables)
    with pytest.raises(
        DataError, match=r"tuetschek/e2e_nlg \w+ is .*, not \d rows of .*SWLORA_E2E"
    ):
        load_dataset(DataSpec())


def test_bad_rows_of_the_hub(monkeypatch):
    tables = hub_tables()
    tables["validation"]["human_reference"][1] = ""
    fake_hub(monkeypatch, lambda: COMMIT, lambda: tables)
    with pytest.raises(DataError, match="e2e_nlg validation, row 2: its completion is empty"):
        load_dataset(DataSpec())
    assert load_dataset(DataSpec(skip_bad_rows=True)).n_skipped_rows == 1


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_goes_straight_to_the_sample(monkeypatch, variable):
    calls = fake_hub(monkeypatch, lambda: COMMIT)
    monkeypatch.setenv(variable, "1")
    dataset = load_dataset(DataSpec())
    assert calls == []
    assert dataset.name == "sample"
    assert dataset.sha256 == load_dataset(DataSpec(name="sample")).sha256
    assert "not E2E" in dataset.source and f"{variable} is set" in dataset.source
    assert "SWLORA_E2E" in dataset.source
    monkeypatch.setenv(variable, "0")
    assert load_dataset(DataSpec()).name == "E2E NLG"


def test_data_that_were_named_are_loaded_or_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    named = DataSpec(name=DEFAULT_DATASET)
    said = r"tuetschek/e2e_nlg cannot be loaded, since .* HF_HUB_OFFLINE is set; .*--dataset sample"
    with pytest.raises(HubUnreachableError, match=said) as refused:
        load_dataset(named)
    assert refused.value.exit_code == 2
    monkeypatch.setenv("SWLORA_E2E", write_e2e(tmp_path / "e2e"))
    assert load_dataset(named).name == "E2E NLG"


def status(code: int) -> HfHubHTTPError:
    response = SimpleNamespace(status_code=code, headers={}, request=None)
    return HfHubHTTPError(f"status {code}", response=response)


@pytest.mark.parametrize("error", [ConnectionError("no\nroute"), OSError("no route"), status(503)])
def test_no_connection_falls_back_to_the_sample_and_says_so(monkeypatch, error):
    calls = fake_hub(monkeypatch, raising(error))
    dataset = load_dataset(DataSpec())
    assert len(calls) == 1
    assert dataset.name == "sample"
    assert f"the Hub cannot be reached: {type(error).__name__}: " in dataset.source
    assert "\n" not in dataset.source


def test_a_hub_that_hangs_is_left_soon(monkeypatch):
    release = threading.Event()
    fake_hub(monkeypatch, lambda: str(release.wait(60)))
    monkeypatch.setattr(sources, "HUB_TIMEOUT_S", 0.25)
    try:
        assert "no answer in 0.25 s" in load_dataset(DataSpec()).source
    finally:
        release.set()


def test_a_connection_lost_while_loading_falls_back(monkeypatch):
    fake_hub(monkeypatch, lambda: COMMIT, raising(ConnectionError("gone")))
    assert "cannot be reached: ConnectionError: gone" in load_dataset(DataSpec()).source


def test_a_refusal_is_an_error_and_not_a_reason_to_use_other_data(monkeypatch):
    fake_hub(monkeypatch, raising(status(404)))
    with pytest.raises(UserError, match=r"the Hub refuses tuetschek/e2e_nlg: .*status 404"):
        load_dataset(DataSpec())
    fake_hub(monkeypatch, lambda: COMMIT, raising(RuntimeError("scripts are no longer supported")))
    with pytest.raises(UserError, match=r"cannot load .*scripts are no longer.*SWLORA_E2E"):
        load_dataset(DataSpec())


def test_the_folder_in_the_environment_comes_first(monkeypatch, tmp_path):
    calls = fake_hub(monkeypatch, lambda: COMMIT)
    folder = write_e2e(tmp_path / "e2e")
    monkeypatch.setenv("SWLORA_E2E", folder)
    assert load_dataset(DataSpec()) == load_dataset(DataSpec(name=folder))
    monkeypatch.setenv("SWLORA_E2E", str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=r"SWLORA_E2E: the folder .*elsewhere has no trainset\.csv"):
        load_dataset(DataSpec())
    assert calls == []
