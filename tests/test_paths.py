"""A text that is too long for a path is not looked for on the disk, which would be an error."""

from collections.abc import Callable
from pathlib import Path

import pytest

from swlora.adapters.saved import adapter_folder
from swlora.api.call import path_of
from swlora.config import DataSpec, ModelSpec, RunSpec, load_spec
from swlora.data.sources import load_dataset
from swlora.deploy.hub_places import places_in
from swlora.deploy.run_notes import command_of
from swlora.errors import UserError
from swlora.evaluation.samples import read_prompts
from swlora.evaluation.user_metrics import load_metric
from swlora.models.load import load_skeleton
from swlora.paths import expanded, may_be_path

LONG = "Which river is it, and " * 20
ONE_WORD = "word" * 100


def test_what_may_be_a_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for text in (
        str(tmp_path),
        tmp_path / "file",
        "none.txt",
        str(tmp_path / "file/below"),
        "",
        "~",
    ):
        assert may_be_path(text)
    for text in ("a" * 256, "é" * 128, "a/" * 5000, "a\0b", Path(ONE_WORD)):
        assert not may_be_path(text)


@pytest.mark.parametrize("text", [LONG, f"{LONG}README.md", ONE_WORD])
def test_a_long_prompt_is_a_text(text: str) -> None:
    assert read_prompts([text]) == [text]
    spec = RunSpec.model_validate({"train": {"sample_prompts": [text]}})
    assert text in command_of(spec, "train")


def test_a_long_word_of_a_file_is_no_place_of_this_machine() -> None:
    assert places_in(f"see /none/{ONE_WORD} there") == []


@pytest.mark.parametrize(
    ("look", "said"),
    [
        (lambda: load_dataset(DataSpec(name=LONG)), "no data set"),
        (lambda: load_dataset(DataSpec(name=f"{ONE_WORD}.txt")), "no data set"),
        (lambda: load_skeleton(ModelSpec(name=f"{ONE_WORD}.gguf")), "there is no file"),
        (lambda: load_skeleton(ModelSpec(name=f"./{ONE_WORD}")), "there is no model folder"),
        (lambda: adapter_folder(Path(ONE_WORD)), "there is no adapter folder"),
        (lambda: load_metric(f"{ONE_WORD}.py:f"), "there is no file"),
    ],
)
def test_a_long_name_is_one_that_is_not_there(look: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        look()


def test_the_home_folder_of_nobody_is_a_path_that_is_not_there() -> None:
    assert expanded("~swlora-nobody/rows.jsonl") == Path("~swlora-nobody/rows.jsonl")
    with pytest.raises(UserError, match="swlora-nobody"):
        load_dataset(DataSpec(name="~swlora-nobody/rows.jsonl"))


def test_a_configuration_may_name_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("adapter: {start: ~/runs/a}\nidentify: {text: ~/a.txt}\n")
    spec = load_spec(tmp_path / "run.yaml", {})
    assert spec.adapter.start == tmp_path / "runs/a" and spec.identify.text == tmp_path / "a.txt"
    assert path_of("~/runs/x") == tmp_path / "runs/x"
