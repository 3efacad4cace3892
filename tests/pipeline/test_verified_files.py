"""A run that goes on knows its model's files and its tokenizer again."""

import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.support.small_runs import Heard
from tests.support.whole_jobs import StopsIn, make_spec, work

from swlora.config import load_spec
from swlora.errors import UserError
from swlora.job import Job
from swlora.models.identity import SAMPLED_VALUES, weights_sample_sha256
from swlora.models.load import load_model
from swlora.runs import Run, read_run

pytestmark = pytest.mark.usefixtures("no_drawings")
WEIGHT = "model.embed_tokens.weight"
FACT = "weights_sha256 model.safetensors"


@pytest.fixture
def stopped(model_folder, rows, tmp_path):
    """A function verify -> (a run that was stopped, its model's folder)."""

    def stop(*, verify: bool) -> tuple[Path, Path]:
        model = Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))
        spec = make_spec(model, rows, train__checkpoint_every_s=1e-9)
        with pytest.raises(KeyboardInterrupt), Run.create(tmp_path / "run", spec, "train") as run:
            work(Job(spec, run, StopsIn("train", 4), verify))
        return tmp_path / "run", model

    return stop


def go_on(folder: Path, *, verify: bool = False, forced=None) -> list[str]:
    run, spec = Run.reopen(folder, "train", {}, forced)
    heard = Heard()
    with run:
        work(Job(spec, run, heard, verify))
    return heard.lines


def sample_of(folder: Path) -> str:
    spec = load_spec(folder / "config.yaml", {})
    return weights_sample_sha256(load_model(spec.model).model)


def change_one_number(model: Path) -> None:
    """Change a number that no sample of the weights holds."""
    tensors = load_file(model / "model.safetensors")
    flat = tensors[WEIGHT].view(-1)
    assert len(flat) > SAMPLED_VALUES
    sampled = {i * 2_654_435_761 % len(flat) for i in range(SAMPLED_VALUES)}
    flat[next(i for i in range(len(flat)) if i not in sampled)] += 1.0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def test_a_number_beside_the_sample_is_noticed_where_the_files_were_hashed(stopped):
    folder, model = stopped(verify=True)
    assert len(read_run(folder)[FACT]) == 64
    before = (model / "model.safetensors").read_bytes()
    sample = sample_of(folder)
    change_one_number(model)
    assert sample_of(folder) == sample
    with pytest.raises(UserError, match=rf"cannot go on: {FACT} was .*put the model's file back"):
        go_on(folder)  # its date says that it was written
    said: list[str] = []
    (model / "model.safetensors").write_bytes(before)
    assert not any("written since" in line for line in go_on(folder, forced=said.append))
    assert said == []


def test_without_hashes_it_is_said_that_files_were_written(stopped):
    folder, model = stopped(verify=False)
    assert FACT not in read_run(folder)
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert any("files were written since this run began" in line for line in go_on(folder))


def test_files_are_hashed_from_the_first_time_that_it_is_asked_for(stopped):
    folder, _ = stopped(verify=False)
    assert any("hashed from here on" in line for line in go_on(folder, verify=True))
    assert len(read_run(folder)[FACT]) == 64


def test_a_tokenizer_that_makes_the_same_tokens_is_told_apart(stopped):
    folder, model = stopped(verify=False)
    path = model / "chat_template.jinja"
    template = path.read_text()
    path.write_text(template + "{# other #}")
    with pytest.raises(UserError, match=r"tokenizer_sha256 was .*put back the tokenizer"):
        go_on(folder)
    said: list[str] = []
    go_on(folder, forced=said.append)
    assert len(said) == 1 and "tokenizer_sha256 was" in said[0]
