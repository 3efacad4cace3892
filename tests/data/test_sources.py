"""Sources by name: E2E folders, the sample, the environment; limits, groups and the hash."""

import csv
from pathlib import Path

import pytest
from tests.support.chat_templates import chat
from tests.support.data_files import E2E, as_jsonl, examples, numbered, write, write_e2e

from swlora.config import DEFAULT_DATASET, DataSpec
from swlora.data import e2e
from swlora.data.dataset import group_references
from swlora.data.examples import Example
from swlora.data.sample import make_sample
from swlora.data.sources import load_dataset
from swlora.errors import UserError

pytestmark = pytest.mark.usefixtures("no_settings_from_outside")


# E2E folders, names and splits


def test_an_e2e_folder_is_read_word_for_word(tmp_path: Path):
    folder = write_e2e(tmp_path / "e2e")
    dataset = load_dataset(DataSpec(name=folder))
    assert dataset.train == examples(E2E["trainset.csv"])
    assert dataset.dev == dataset.split("dev") == examples(E2E["devset.csv"])
    assert dataset.test == dataset.split("test") == examples(E2E["testset_w_refs.csv"])
    assert (dataset.name, dataset.separator, dataset.counts.n_bad) == ("E2E NLG", "\n", 0)
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
    assert sum(e2e.HUB_ROWS.values()) == 42061 + 4672 + 4693


def test_a_folder_that_is_not_e2e_is_refused(tmp_path: Path):
    folder = write_e2e(tmp_path / "e2e")
    (tmp_path / "e2e" / "devset.csv").unlink()
    with pytest.raises(UserError, match=r"has no devset\.csv, so"):
        load_dataset(DataSpec(name=folder))


@pytest.mark.parametrize("name", ["missing", "rows.docx", "a/b/c", "-x/y"])
def test_another_name_lists_what_is_accepted(name: str):
    with pytest.raises(UserError, match=r"give a file \(.*\.jsonl.*folder.*Hub id.*or sample"):
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
    with pytest.raises(UserError, match=f"{flag} is for files of your own, not for"):
        load_dataset(DataSpec(name=name, **option))


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
    turns = (("user", "a"),)
    rows = [Example("b", "1"), Example("a", "2"), Example("b", "3"), chat(turns, "4")]
    rows += [chat((("user", "b"),), "5"), chat(turns, "6"), Example("b", "1")]
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
