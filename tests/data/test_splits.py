"""Folders, patterns and data of the Hub: which rows are trained on, and which are held out."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tests.support.data_files import as_jsonl, examples, numbered, write

from swlora.config import DataSpec
from swlora.data import sources
from swlora.data.dataset import Counts
from swlora.data.examples import Example
from swlora.data.files import data_files, split_files
from swlora.data.rows import Row, collect_rows
from swlora.data.sources import load_dataset
from swlora.errors import DataError, UserError

pytestmark = pytest.mark.usefixtures("no_settings_from_outside")

TRAIN, DEV, TEST = numbered(3), [("d", "1"), ("prompt 0", "2")], [("t", "3")]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards to train on, one of them with another format, and one of each other split."""
    write(tmp_path / "all/data/train-00000-of-00002.jsonl", as_jsonl(TRAIN[:2]))
    write(tmp_path / "all/data/train-00001-of-00002.json", json_list(TRAIN[2:]))
    write(tmp_path / "all/data/validation-00000.jsonl", as_jsonl(DEV))
    write(tmp_path / "all/test/part.jsonl", as_jsonl(TEST))
    write(tmp_path / "all/.hidden/train.jsonl", b"nonsense")
    write(tmp_path / "all/README.md", b"nothing to read")
    return tmp_path / "all"


def json_list(rows: list[tuple[str, str]]) -> bytes:
    return json.dumps([{"prompt": p, "completion": c} for p, c in rows]).encode()


def test_a_folder_of_shards_has_the_splits_that_its_names_say(shards: Path) -> None:
    dataset = load_dataset(DataSpec(name=str(shards)))
    assert (dataset.train, dataset.dev, dataset.test) == tuple(map(examples, (TRAIN, DEV, TEST)))
    assert dataset.counts == Counts({}, n_duplicates=0, n_leaked=2)  # two rows of "prompt 0"
    assert "its dev split" in dataset.source and "4 files" in dataset.source
    with pytest.raises(UserError, match="has a dev split of its own: leave out --eval-share"):
        load_dataset(DataSpec(name=str(shards), eval_share=0.5))


def test_patterns(shards: Path) -> None:
    dataset = load_dataset(DataSpec(name=str(shards / "data/train-*")))
    assert (dataset.train, dataset.dev) == (examples(TRAIN[:2] + TRAIN[4:]), examples(TRAIN[2:4]))
    deep = load_dataset(DataSpec(name=str(shards / "**/*.jsonl")))
    assert (deep.train, deep.dev, deep.test) == tuple(map(examples, (TRAIN[:2], DEV, TEST)))
    with pytest.raises(UserError, match=r"holds no file that can be read: \.jsonl, "):
        load_dataset(DataSpec(name=str(shards / "*.parquet")))
    with pytest.raises(UserError, match="has no file to train on, only validation"):
        load_dataset(DataSpec(name=str(shards / "data/val*")))


def test_a_file_that_was_named_is_trained_on_whatever_its_name(shards: Path) -> None:
    path = shards / "test/part.jsonl"
    assert split_files(data_files(str(path)), path)["train"] == [path]


def test_a_file_whose_name_is_a_pattern_too(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "rows[1].jsonl", as_jsonl(TRAIN)))
    write(tmp_path / "rows1.jsonl", b"nonsense")
    assert data_files(str(path)) == [path]


def test_what_datasets_saved_is_read_without_its_notes(tmp_path: Path) -> None:
    splits = {"train": pairs(TRAIN), "validation": pairs(DEV)}
    saved = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "saved"))
    dataset = load_dataset(DataSpec(name=str(tmp_path / "saved")))
    assert (dataset.train, dataset.dev) == (examples(TRAIN), examples(DEV))
    assert (tmp_path / "saved/train/dataset_info.json").is_file()


def test_a_share_is_held_out(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", as_jsonl(numbered(10)))
    dataset = load_dataset(DataSpec(name=name, eval_share=0.35))
    assert {e.prompt for e in dataset.dev} == {"prompt 7", "prompt 8", "prompt 9"}
    assert len(dataset.train) + len(dataset.dev) == len(numbered(10))
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="eval_share"):
            DataSpec(eval_share=share)


def test_one_document_is_trained_on_without_a_dev_split(tmp_path: Path) -> None:
    dataset = load_dataset(DataSpec(name=write(tmp_path / "a.txt", b"A text.")))
    assert dataset.train == (Example(text="A text."),) and not dataset.dev
    assert "none is held out" in dataset.source
    with pytest.raises(UserError, match=r"no dev split; name rows to evaluate on with --eval-file"):
        dataset.split("dev")  # and none advises --split train, which is no choice
    with pytest.raises(UserError, match="no train split; name rows to train on with --dataset"):
        replace(dataset, train=(), dev=dataset.train).split("train")


def test_a_column_that_no_row_has_is_refused(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", b'{"instruction": "a", "output": "b"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: no row has the column 'context'"):
        load_dataset(DataSpec(name=name, columns=["input=context"]))


def test_an_evaluation_file_and_a_share_are_two_answers(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", as_jsonl(TRAIN))
    with pytest.raises(UserError, match="leave out --eval-share"):
        load_dataset(DataSpec(name=name, eval_file=Path(name), eval_share=0.1))


def test_reasons_name_what_differs(tmp_path: Path) -> None:
    fields = ['"images": ["x"]', '"images": ["y"]', '"audio": "z"']
    rows = "".join(f'{{"prompt": "a", "completion": "b", {f}}}\n' for f in fields)
    name = write(tmp_path / "a.jsonl", as_jsonl(TRAIN) + rows.encode())
    counts = load_dataset(DataSpec(name=name, skip_bad_rows=True)).counts
    assert counts.bad == {"it has the field 'images'": 2, "it has the field 'audio'": 1}


def test_what_is_counted(tmp_path: Path) -> None:
    rows = [("a", "1"), ("a", "1"), ("a", "2"), ("b", "1"), ("c", "9")]
    bad = b'{"prompt": "", "completion": "x"}\n{"prompt": "a"}\n{"prompt": " ", "completion": 3}\n'
    name = write(tmp_path / "a.jsonl", as_jsonl(rows) + bad + b"{\n[1]\n")
    held_out = write(tmp_path / "b.jsonl", as_jsonl([("b", "2"), ("z", "1")]) + b"{}\n")
    spec = DataSpec(name=name, eval_file=Path(held_out), skip_bad_rows=True)
    counts = load_dataset(spec).counts
    assert (counts.n_duplicates, counts.n_leaked, counts.n_bad) == (1, 1, 6)
    assert dict(counts.bad) == {
        "its prompt is empty": 2,
        "its columns are of no known form": 2,
        "not valid JSON": 1,
        "not a JSON object": 1,
    }


# The Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A data set of Parquet files, read by `datasets` as one of the Hub is; returns its id."""
    monkeypatch.setattr(sources, "hub_commit", lambda *_: "0123456789abcdef")
    load = datasets.load_dataset

    def local(name: str, config: str | None, *, revision: str, streaming: bool) -> Any:
        assert (revision, streaming) == ("0123456789abcdef", True)
        return load(str(tmp_path / name), config, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", local)

    def make(**splits: list[dict[str, Any]]) -> str:
        folder = tmp_path / "org/chats/data"
        folder.mkdir(parents=True)
        for name, rows in splits.items():
            table = pyarrow.Table.from_pylist(rows)
            pyarrow.parquet.write_table(table, folder / f"{name}-00000-of-00001.parquet")
        return "org/chats"

    return make


def pairs(rows: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "completion": completion} for prompt, completion in rows]


def test_data_of_the_hub(hub: Callable[..., str]) -> None:
    name = hub(train=pairs(TRAIN), validation=pairs(DEV), test=pairs(TEST))
    dataset = load_dataset(DataSpec(name=name))
    assert (dataset.train, dataset.dev, dataset.test) == tuple(map(examples, (TRAIN, DEV, TEST)))
    assert dataset.source == "org/chats from the Hub, at 0123456789ab, with its dev split"
    assert dataset.train[1].place == "org/chats train, row 2"
    other = load_dataset(DataSpec(name=name, train_split="test", eval_share=None))
    assert (other.train, other.dev, other.test) == (examples(TEST), examples(DEV), ())


def test_splits_of_the_hub_are_known_as_files_of_their_names_are(
    hub: Callable[..., str], tmp_path: Path
) -> None:
    more = [("v", "1")]
    splits = {"train_sft": TRAIN, "validation_a": DEV, "evaluation": more, "test_sft": TEST}
    name = hub(**{split: pairs(rows) for split, rows in splits.items()})
    found = load_dataset(DataSpec(name=name, train_split="train_sft"))
    for split, rows in splits.items():
        write(tmp_path / f"files/{split}.jsonl", as_jsonl(rows))
    files = load_dataset(DataSpec(name=str(tmp_path / "files")))
    for dataset in (found, files):
        assert (dataset.train, dataset.test) == (examples(TRAIN), examples(TEST))
        assert sorted(e.prompt for e in dataset.dev) == sorted(p for p, _ in [*DEV, *more])
    other = load_dataset(DataSpec(name=name, train_split="validation_a"))
    assert (other.train, other.dev) == (examples(DEV), examples(more))


def test_no_more_of_the_hub_is_read_than_is_trained_on(hub: Callable[..., str]) -> None:
    """A stream may be longer than anybody can wait for: row 40 is bad, and never reached."""
    good = pairs([(f"p{i}", "c") for i in range(39)])
    name = hub(train=[*good, {"prompt": "", "completion": ""}])
    dataset = load_dataset(DataSpec(name=name, train_rows=19))
    assert (len(dataset.train), [e.prompt for e in dataset.dev]) == (19, ["p19"])
    with pytest.raises(DataError, match="row 40"):
        load_dataset(DataSpec(name=name, train_rows=38))


def test_pictures_that_no_form_has_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {name: datasets.Value("string") for name in ("prompt", "completion")}
    rows = [{**row, "picture": {"bytes": b"none", "path": None}} for row in pairs(TRAIN)]
    described = datasets.Features({**features, "picture": datasets.Image()})
    table = datasets.Dataset.from_list(rows, features=described).to_iterable_dataset()
    monkeypatch.setattr(sources, "hub_commit", lambda *_: "0123456789abcdef")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": table})
    dataset = load_dataset(DataSpec(name="org/pictures"))
    found = sorted((*dataset.train, *dataset.dev), key=lambda example: example.number)
    assert tuple(found) == examples(TRAIN)


def test_nested_chats_of_the_hub(hub: Callable[..., str]) -> None:
    turns = [{"role": "user", "content": f"{i}?"} for i in range(3)]
    rows = [{"messages": [turn, {"role": "assistant", "content": "No."}]} for turn in turns]
    dataset = load_dataset(DataSpec(name=hub(train=rows)))
    assert [e.messages[0].content for e in (*dataset.train, *dataset.dev)] == ["0?", "1?", "2?"]
    assert "its last 1 of 3 distinct prompts are the dev split" in dataset.source


def test_what_the_hub_refuses(hub: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    name = hub(train=[{"question": "a", "answer": "b"}])
    with pytest.raises(UserError, match="has no split 'dev', only train: --train-split"):
        load_dataset(DataSpec(name=name, train_split="dev"))
    with pytest.raises(DataError, match=r"org/chats: its columns .*prompt=question,completion=an"):
        load_dataset(DataSpec(name=name))
    with pytest.raises(UserError, match=r"cannot load org/chats: .*gone.*--config-name"):
        load_dataset(DataSpec(name=name, config_name="gone"))

    def script(*_: Any, **__: Any) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found chats.py")

    monkeypatch.setattr(datasets, "load_dataset", script)
    with pytest.raises(UserError, match="it is a script, which is not run; try --dataset-revision"):
        load_dataset(DataSpec(name=name))


@pytest.mark.parametrize("setting", ["train_split", "config_name", "dataset_revision"])
def test_settings_of_the_hub_are_not_for_files(setting: str, tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", as_jsonl(TRAIN))
    flag = f"--{setting.replace('_', '-')}"
    with pytest.raises(UserError, match=f"{flag} is for data of the Hub, not for .*a.jsonl"):
        load_dataset(DataSpec(name=name, **{setting: "x"}))


def test_splits_that_an_evaluation_file_replaces_are_not_read(shards: Path, tmp_path: Path) -> None:
    (shards / "test/part.jsonl").write_text("{\n")
    held_out = write(tmp_path / "eval.jsonl", as_jsonl([("e", "1")]))
    dataset = load_dataset(DataSpec(name=str(shards), eval_file=Path(held_out)))
    assert (dataset.train, dataset.dev) == (examples(TRAIN), examples([("e", "1")]))
    assert dataset.test == dataset.dev and dataset.counts.n_bad == 0


def test_a_column_that_one_split_has_is_there(tmp_path: Path) -> None:
    rows = [{"instruction": f"{i}", "ctx": "x", "output": "y"} for i in range(3)]
    write(tmp_path / "d/train.jsonl", "\n".join(map(json.dumps, rows)).encode())
    write(tmp_path / "d/dev.jsonl", b'{"instruction": "a", "output": "b"}')
    dataset = load_dataset(DataSpec(name=str(tmp_path / "d"), columns="input=ctx"))
    assert dataset.train[0].messages[0].content == "0\n\nx"
    assert dataset.dev[0].messages[0].content == "a"
    with pytest.raises(DataError, match="d: no row has the column 'gone'"):
        load_dataset(DataSpec(name=str(tmp_path / "d"), columns="input=gone"))


def test_a_column_that_no_row_of_the_hub_has_is_refused(hub: Callable[..., str]) -> None:
    rows = [{"instruction": f"{i}", "context": "x", "output": "y"} for i in range(3)]
    with pytest.raises(DataError, match="org/chats: no row has the column 'contxt'"):
        load_dataset(DataSpec(name=hub(train=rows), columns="input=contxt"))


def test_what_a_map_of_datasets_left_is_no_data(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    rows = [{"prompt": f"{i}", "completion": "a"} for i in range(4)]
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))
    mapped = datasets.load_from_disk(str(folder)).map(lambda row: {"completion": row["prompt"]})
    assert any(path.name.startswith("cache-") for path in folder.iterdir()) and len(mapped) == 4
    dataset = load_dataset(DataSpec(name=str(folder)))
    assert [e.completion for e in (*dataset.train, *dataset.dev)] == ["a"] * 4


def test_a_stream_ends_at_its_first_bad_row() -> None:
    """It may have no end; with --skip-bad-rows it is read on."""

    def rows(n_good: int) -> Iterator[Row]:
        yield "x, row", 1, "its prompt is empty"
        for number in range(2, n_good + 2):
            yield "x, row", number, Example("a", "b")
        raise AssertionError("it was read on")

    with pytest.raises(DataError, match="x, row 1: its prompt is empty; --skip-bad-rows leaves it"):
        collect_rows(rows(0), "x, row 1", skip_bad_rows=False, limit=3)
    assert len(collect_rows(rows(3), "x, row 1", skip_bad_rows=True, limit=3).examples) == 3


@pytest.mark.parametrize("ending", [".jsonl.zst", ".csv.bz2", ".json.zip", ".txt.xz"])
@pytest.mark.parametrize("named", ["folder", "pattern", "file"])
def test_rows_that_are_packed_in_another_way_are_not_passed_over(ending, named, tmp_path):
    rows = [json.dumps({"prompt": p, "completion": "c"}) for p in "pq"]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    packed = tmp_path / f"b{ending}"
    packed.write_bytes(b"packed")
    (tmp_path / "model.zip").write_bytes(b"nothing of ours")
    name = {"folder": tmp_path, "pattern": tmp_path / "*", "file": packed}[named]
    with pytest.raises(UserError, match=r"cannot be read as packed: unpack, or pack with gzip"):
        load_dataset(DataSpec(name=str(name)))
    packed.unlink()
    if named != "file":
        assert len(load_dataset(DataSpec(name=str(name), eval_share=0.5)).train) == 1
