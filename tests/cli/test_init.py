"""`swlora init`: a configuration to begin with, which the commands that it names take."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from tests.support.data_files import write_rows
from tests.support.schemas import validated

from swlora.config import load_spec
from swlora.models.builtin import unpacked_folder

pytestmark = pytest.mark.usefixtures("no_network")


def test_init_writes_what_check_and_train_take(swlora, model, rows):
    done = swlora("init", "--model", model, "--dataset", rows, "--schema", "--json", "made.json")
    assert done.code == 0, done
    text = Path("swlora.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=swlora.schema.json\n")
    settings = [line for line in text.splitlines() if line.startswith("  ")]
    assert all("  # " in line for line in settings)  # each says why
    spec = load_spec(Path("swlora.yaml"), {})
    assert (spec.model.name, spec.data.name, spec.train.epochs) == (model, str(rows), 3)
    assert spec.train.early_stopping == 3 and spec.decode.max_new_tokens == 32
    assert validated(yaml.safe_load(text), json.loads(Path("swlora.schema.json").read_text())) == []
    assert json.loads(Path("made.json").read_text())["settings"]["train.epochs"] == 3
    assert swlora("check", "swlora.yaml").code == 0
    done = swlora("train", "--config", "swlora.yaml", "--device", "cpu", "--output", "run")
    assert done.code == 0, done


def test_init_writes_over_nothing(swlora, model, rows):
    Path("mine.yaml").write_text("precious")
    arguments = ("init", "mine.yaml", "--model", model, "--dataset", rows)
    assert swlora(*arguments).mistake == "mine.yaml is there already; --force writes over it"
    assert Path("mine.yaml").read_text() == "precious"
    assert swlora(*arguments, "--force").code == 0
    assert load_spec(Path("mine.yaml"), {}).data.name == str(rows)


def test_the_commands_that_init_names_work_where_it_was_called(swlora, model, rows):
    done = swlora("init", "my runs/mine.yaml", "--model", model, "--dataset", rows)
    (told,) = re.findall("^next: swlora (.*?);", done.out, re.M)
    (noted,) = re.findall("^# swlora (check .*):", Path("my runs/mine.yaml").read_text(), re.M)
    assert noted == told and swlora(*shlex.split(told)).code == 0


@pytest.mark.usefixtures("fresh_cache")
def test_init_names_the_model_that_it_looked_at(swlora, model, rows, monkeypatch):
    """Offline the embedded one takes the place of the default, which would be another later."""
    shutil.copytree(model, unpacked_folder())
    monkeypatch.setattr("swlora.models.load.cached_file", lambda *_: None)
    done = swlora("init", "--dataset", rows)
    assert done.code == 0, done
    assert "name: builtin" in Path("swlora.yaml").read_text()
    assert load_spec(Path("swlora.yaml"), {}).model.name == "builtin"


def test_init_needs_data(swlora, model):
    assert "--dataset rows.jsonl" in swlora("init", "--model", model).mistake
    assert not Path("swlora.yaml").exists()


def test_init_of_one_document_names_a_command_that_takes_it(swlora, model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A sentence of a text. " * 40)
    done = swlora("init", "--model", model, "--dataset", text)
    assert done.code == 0, done
    (told,) = re.findall("^next: swlora check .*; swlora (.*)", done.out, re.M)
    assert told == "train --config swlora.yaml"
    written = Path("swlora.yaml").read_text()
    assert f"# swlora {told}: trains; " in written and "train-eval" not in written
    where = ("--device", "cpu", "--output", "run")
    assert swlora(*told.split(), "--max-steps", 1, *where).code == 0
    refused = swlora("train-eval", "--config", "swlora.yaml", "--device", "cpu").mistake
    assert "--eval-file, or only train them (swlora train)" in refused


def test_init_sees_bad_and_long_rows(swlora, model, tmp_path):
    long = {"prompt": "x" * 400, "completion": "y" * 400}
    rows = [{"prompt": f"p: {k}", "completion": f"# '{k}': " + "z" * 40} for k in range(9)]
    path = write_rows(tmp_path / "odd: rows.jsonl", [*rows, long, {"prompt": "p", "completion": 3}])
    done = swlora("init", "--model", model, "--dataset", path)
    assert done.code == 0, done
    spec = load_spec(Path("swlora.yaml"), {})
    assert spec.data.name == str(path)
    assert spec.data.truncate and spec.data.skip_bad_rows
    assert spec.decode.max_new_tokens >= 48


@pytest.mark.parametrize(
    ("n_prompt", "n_answer", "n_new", "is_cut"),
    [(180, 90, 76, False), (20, 90, 96, False), (240, 10, 32, True), (300, 90, 96, True)],
    ids=["beside the prompt", "as trained", "a few", "rows are cut"],
)
def test_init_leaves_room_for_answers_that_eval_accepts(
    swlora, model, tmp_path, n_prompt, n_answer, n_new, is_cut
):
    """A byte is a token; the longest prompt is held out of training."""
    rows = [{"prompt": f"{k:02}: ", "completion": "z" * n_answer} for k in range(39)]
    rows.append({"prompt": "x" * n_prompt, "completion": "y"})
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert swlora("init", "--model", model, "--dataset", path).code == 0
    spec = load_spec(Path("swlora.yaml"), {})
    assert (spec.decode.max_new_tokens, spec.data.truncate) == (n_new, is_cut)
    where = ("--device", "cpu", "--max-steps", 1, "--output", "run")
    done = swlora("train-eval", "--config", "swlora.yaml", *where)
    assert done.code == 0, done
