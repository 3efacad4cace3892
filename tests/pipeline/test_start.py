"""Runs that start from an adapter: its place and base, its record, their resume."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from tests.support.small_runs import Heard
from tests.support.whole_jobs import StopsIn, make_spec, resume, run_in, same_adapters
from transformers import AutoTokenizer

from swlora import pipeline
from swlora.adapters.saved import read_facts
from swlora.config import RunSpec, load_spec
from swlora.config.rates import RATES
from swlora.errors import UserError
from swlora.files import sha256_of
from swlora.job import TOKENIZER_OF_START, Job
from swlora.progress import Silent
from swlora.runs import Run, read_run

pytestmark = pytest.mark.usefixtures("no_drawings")


def first_run(model_folder, rows, tmp_path):
    spec = make_spec(model_folder("llama"), rows, adapter__layers="last:1", train__max_steps=3)
    run_in(tmp_path / "first", spec, "train")
    return tmp_path / "first"


def train_in(folder, spec, progress=None):
    """Train as the command does: the folder is made when the adapter was read."""
    with Run.prepare(folder, spec, "train") as run:
        return pipeline.train(Job(spec, run, progress or Silent()))


def starting(spec, folder, **changes):
    """The same settings for a run that starts from an adapter, which brings its own."""
    tree = spec.model_dump(mode="json", exclude_unset=True) | {"adapter": {"start": str(folder)}}
    return RunSpec.model_validate(tree | changes)


def test_it_goes_on_from_the_losses_of_the_first(model_folder, rows, tmp_path):
    first = first_run(model_folder, rows, tmp_path)
    spec, heard = starting(make_spec(model_folder("llama"), rows), first), Heard()
    result = train_in(tmp_path / "second", spec, heard)
    assert result.layers == [2]
    settled = load_spec(tmp_path / "second" / "config.yaml", {}).adapter
    assert (settled.method, settled.rank, str(settled.layers)) == ("lora", 3, "2")
    assert any(line.startswith(f"starts from the adapter in {first}") for line in heard.lines)
    noted = sha256_of(first / "adapter" / "adapter_model.safetensors")
    assert read_run(tmp_path / "second")["start_adapter_sha256"] == noted
    assert read_facts(tmp_path / "second" / "adapter")["start_adapter_sha256"] == noted
    assert noted in (tmp_path / "second" / "adapter" / "README.md").read_text()
    of_first = json.loads((first / "metrics.jsonl").read_text().splitlines()[0])
    of_second = json.loads((tmp_path / "second" / "metrics.jsonl").read_text().splitlines()[0])
    assert of_second["loss"] < of_first["loss"]


@pytest.mark.parametrize("given", [{}, {"learning_rate": 0.02}])
def test_without_a_rate_it_has_that_of_the_adapters_method(model_folder, rows, tmp_path, given):
    first = make_spec(model_folder("llama"), rows, adapter__method="lora+", train__max_steps=1)
    run_in(tmp_path / "plus", first, "train")
    train = {"max_steps": 2, "schedule": "constant", "warmup_fraction": 0.0, **given}
    spec = starting(first, tmp_path / "plus", train=train)
    train_in(tmp_path / "second", spec)
    expected = given.get("learning_rate", RATES["lora+"])
    lines = (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["learning_rate"] for line in lines] == [expected, expected]
    assert load_spec(tmp_path / "second" / "config.yaml", {}).train.learning_rate == expected


def test_a_stopped_one_goes_on_and_not_from_another_adapter(model_folder, rows, tmp_path):
    first = first_run(model_folder, rows, tmp_path)
    spec = starting(make_spec(model_folder("llama"), rows, train__checkpoint_every_s=1e-9), first)
    train_in(tmp_path / "whole", spec)
    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        train_in(folder, spec, StopsIn("train", 5))
    weights = first / "adapter" / "adapter_model.safetensors"
    content, noted = weights.read_bytes(), (first / "adapter" / "swlora.json").read_bytes()
    tensors = load_file(weights)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, weights)
    (first / "adapter" / "swlora.json").unlink()
    with pytest.raises(UserError, match="cannot go on: start_adapter_sha256 was"):
        resume(folder)
    weights.write_bytes(content)
    (first / "adapter" / "swlora.json").write_bytes(noted)
    first.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"is not in .*first any more; .* --adapter DIR"):
        resume(folder)
    run, moved = Run.reopen(folder, "train", {"adapter.start": tmp_path / "moved"})
    heard = Heard()
    with run:
        pipeline.train(Job(moved, run, heard))
    assert any("adapter.start was" in line for line in heard.lines)
    assert not any("new optimizer" in line for line in heard.lines)
    assert same_adapters(folder, tmp_path / "whole")


@pytest.mark.parametrize("is_named", [True, False])
def test_it_has_the_tokenizer_of_the_adapter_wherever_that_lies(
    model_folder, rows, tmp_path, is_named
):
    """Nobody asked for it, so the configuration does not name it, nor the place where it lay."""
    first = first_run(model_folder, rows, tmp_path)
    own = AutoTokenizer.from_pretrained(first / "adapter")
    own.chat_template = "{{ messages[0].content }}"
    own.save_pretrained(first / "adapter")
    spec = make_spec(model_folder("llama"), rows, train__checkpoint_every_s=1e-9)
    own_model = {} if is_named else {"model": {"dtype": "float32", "device": "cpu"}}
    spec, folder = starting(spec, first, **own_model), tmp_path / "second"
    with pytest.raises(KeyboardInterrupt):
        train_in(folder, spec, StopsIn("train", 2))
    assert load_spec(folder / "config.yaml", {}).model.tokenizer is None
    first.rename(tmp_path / "moved")
    run, moved = Run.reopen(folder, "train", {"adapter.start": tmp_path / "moved"})
    with run:
        trained = pipeline.train(Job(moved, run, Silent()))
    assert trained.loaded.tokenizer.chat_template == own.chat_template


def test_a_run_of_an_older_version_goes_on_with_the_tokenizer_of_its_model(
    model_folder, rows, tmp_path
):
    first = first_run(model_folder, rows, tmp_path)
    spec = starting(make_spec(model_folder("llama"), rows, train__checkpoint_every_s=1e-9), first)
    with pytest.raises(KeyboardInterrupt):
        train_in(tmp_path / "second", spec, StopsIn("train", 2))
    facts = read_run(tmp_path / "second")
    del facts[TOKENIZER_OF_START]
    (tmp_path / "second/run.json").write_text(json.dumps(facts))
    run, again = Run.reopen(tmp_path / "second", "train")
    with run:
        trained = pipeline.train(Job(again, run, Silent()))
    assert trained.loaded.tokenizer.name_or_path == str(model_folder("llama"))


def test_a_run_that_started_from_nothing_takes_no_adapter_later(model_folder, rows, tmp_path):
    first = first_run(model_folder, rows, tmp_path)
    with pytest.raises(UserError, match="keeps its --adapter"):
        Run.reopen(first, "train", {"adapter.start": first})


def test_its_model_is_that_of_the_adapter_where_none_is_named(model_folder, rows, tmp_path):
    first = first_run(model_folder, rows, tmp_path)
    spec = make_spec(model_folder("llama"), rows)
    spec = starting(spec, first, model={"dtype": "float32", "device": "cpu"})
    train_in(tmp_path / "second", spec)
    written = load_spec(tmp_path / "second" / "config.yaml", {})
    assert written.model.name == str(model_folder("llama"))


def test_other_weights_than_those_of_the_adapter_are_refused(model_folder, rows, tmp_path):
    first = first_run(model_folder, rows, tmp_path)
    model = shutil.copytree(model_folder("llama"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.5
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    spec = starting(make_spec(model, rows), first)
    with pytest.raises(UserError, match=r"was trained on .* and this is the folder") as refused:
        train_in(tmp_path / "second", spec)
    assert "\n" not in str(refused.value)
