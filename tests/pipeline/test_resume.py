"""Stop and resume: the same adapter as if nothing had happened, of the same data."""

import json
import os
import shutil
from pathlib import Path

import peft
import pytest
from safetensors.torch import load_file, save_file
from tests.support.data_files import write_rows
from tests.support.small_runs import ROWS
from tests.support.whole_jobs import StopsIn, make_spec, resume, run_in, same_adapters

from swlora import preparation
from swlora.config import RunSpec
from swlora.data import truncate
from swlora.errors import RunFailedError, UserError
from swlora.metrics_file import read_metrics
from swlora.progress import Silent
from swlora.recovery import recover
from swlora.runs import Run, read_run
from swlora.training.checkpoint import steps_done

pytestmark = pytest.mark.usefixtures("no_drawings")


@pytest.mark.parametrize(
    ("engine", "task", "n", "n_steps"),
    [
        ("tree", "train", 2, 1),
        ("tree", "train", 6, 5),
        ("plain", "train", 6, 5),
        ("tree, pairs", "train", 6, 5),
        ("tree", "generate", 1, 12),
    ],
)
def test_a_resumed_run_gives_the_same_adapter(
    task, n, n_steps, engine, model_folder, rows, tmp_path
):
    """Stopped before the first checkpoint, in training, or after it; with dropout, which is random.

    (The first advance is the start of the training.)
    """
    changes = {"adapter__dropout": 0.3, "train__checkpoint_every_s": 1e-9}
    engine, _, order = engine.partition(", ")
    changes |= {"train__engine": engine, "train__order": order or "prompts"}
    spec = make_spec(model_folder("llama"), rows, **changes)
    expected = run_in(tmp_path / "whole", spec)
    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run_in(folder, spec, progress=StopsIn(task, n))
    assert read_run(folder)["status"] == "cancelled"
    assert len(read_metrics(folder)) == n_steps
    result = resume(folder)
    assert same_adapters(tmp_path / "whole", folder)
    assert result["eval"]["nll"] == expected["eval"]["nll"]
    for key in ("rows", "steps", "last_loss", "n_trainable"):
        assert result["train"][key] == expected["train"][key]
    facts = read_run(folder)
    assert (facts["status"], facts["resumed"]) == ("done", 1)
    assert steps_done(folder / "checkpoint") == 12
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, 13))


def test_a_run_does_not_go_on_with_other_weights(model_folder, rows, tmp_path):
    folder = tmp_path / "run"
    model = Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))
    with pytest.raises(KeyboardInterrupt):
        run_in(folder, make_spec(model, rows), progress=StopsIn("train", 3))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.5
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"base_weights_sample_sha256 was .* put the weights") as no:
        resume(folder)
    assert len(str(no.value).splitlines()) == 1


def test_a_run_does_not_go_on_with_other_data(model_folder, rows, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_in(folder, make_spec(model_folder("llama"), rows), progress=StopsIn("train", 3))
    write_rows(rows[0], [*ROWS[1:], ROWS[0]])
    with pytest.raises(UserError, match="cannot go on: data_sha256 was"):
        resume(folder)
    write_rows(rows[0], ROWS)
    assert resume(folder)["train"]["steps"] == 12


CHATS = [
    {"messages": [{"role": "user", "content": food}, {"role": "assistant", "content": "E."}]}
    for food in "abcdefghijkl"
]
LONG = [{"prompt": f"{word}\n" * 150, "completion": word} for word in "abcdefghijkl"]


def stopped(folder: Path, spec: RunSpec) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_in(folder, spec, progress=StopsIn("train", 3))


def forget_the_tokens(folder: Path) -> None:
    """Make of a run one of a version that recorded no tokens."""
    facts = json.loads((folder / "run.json").read_text())
    facts.pop("train_tokens_sha256")
    facts.pop("held_out_tokens_sha256")
    (folder / "run.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("changed", ["template", "tokenizer", "cut"])
def test_a_run_does_not_go_on_with_other_tokens(
    changed, model_folder, bos_tokenizer, tiny_tokenizer, tmp_path, monkeypatch
):
    model, folder = tmp_path / "model", tmp_path / "run"
    shutil.copytree(model_folder("llama"), model)
    path = write_rows(
        tmp_path / "rows.jsonl", {"template": CHATS, "tokenizer": ROWS, "cut": LONG}[changed]
    )
    stopped(folder, make_spec(model, (path, path), data__truncate=changed == "cut"))
    before = read_run(folder)
    with monkeypatch.context() as patch:
        if changed == "cut":  # as a version might that keeps less of the prompt
            patch.setattr("swlora.data.encode.cut", lambda row, n: truncate.cut(row, n - 1))
        elif changed == "tokenizer":
            bos_tokenizer().save_pretrained(model)
        else:
            template = model / "chat_template.jinja"
            template.write_text(template.read_text().replace("<s>", "<s>so "))
        with pytest.raises(UserError, match="cannot go on: train_tokens_sha256 was") as refused:
            resume(folder)
    assert "put back the tokenizer and the chat template" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert read_run(folder)["train_tokens_sha256"] == before["train_tokens_sha256"]
    tiny_tokenizer.save_pretrained(model)
    assert resume(folder)["train"]["steps"] == 12


def test_an_older_run_goes_on_unless_its_rows_are_cut(model_folder, rows, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    stopped(whole, make_spec(model_folder("llama"), rows, data__truncate=True))
    forget_the_tokens(whole)
    assert resume(whole)["train"]["steps"] == 12
    assert "train_tokens_sha256" in read_run(whole)
    long = write_rows(tmp_path / "long.jsonl", LONG)
    stopped(cut, make_spec(model_folder("llama"), (long, rows[1]), data__truncate=True))
    forget_the_tokens(cut)
    for _ in range(2):
        with pytest.raises(UserError, match="12 of its rows are cut to the context, and the older"):
            resume(cut)


@pytest.mark.parametrize(("chosen", "is_noted", "n_steps"), [(14, True, 54), (32, False, 24)])
def test_a_run_keeps_the_rows_a_step_that_it_chose(
    chosen, is_noted, n_steps, model_folder, tmp_path, monkeypatch
):
    """Where another version chooses others, and where it was begun by one that noted none."""
    many = [{"prompt": f"{k}", "completion": f" is {k % 7}."} for k in range(250)]
    data = (write_rows(tmp_path / "many.jsonl", many),) * 2
    free = {"train__batch_size": None, "train__epochs": None, "train__checkpoint_every_s": 1e-9}
    folder = tmp_path / "run"
    with monkeypatch.context() as before:
        before.setattr(preparation, "DEFAULT_BATCH_SIZE", chosen)
        stopped(folder, make_spec(model_folder("llama"), data, **free))
    facts = read_run(folder)
    assert facts["fitted"] == {"epochs": 3, "batch_size": chosen}
    if not is_noted:
        del facts["fitted"]
        (folder / "run.json").write_text(json.dumps(facts))
    assert resume(folder)["train"]["steps"] == n_steps


def test_a_run_does_not_go_on_beside_other_held_out_tokens(model_folder, rows, tmp_path):
    folder = tmp_path / "run"
    stopped(folder, make_spec(model_folder("llama"), rows, train__eval_every_steps=2))
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(facts | {"held_out_tokens_sha256": "0" * 64}))
    with pytest.raises(UserError, match="cannot go on: held_out_tokens_sha256 was 000000000000 "):
        resume(folder)


def test_a_full_disk_when_the_adapter_is_saved_costs_no_training(
    model_folder, rows, tmp_path, monkeypatch
):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(RunFailedError, match="No space left"):
        patch.setattr(peft.PeftModel, "save_pretrained", full)
        run_in(folder, make_spec(model_folder("llama"), rows))
    monkeypatch.setattr("swlora.training.loop._one_step", full)  # must not be needed again
    assert resume(folder)["train"]["steps"] == 12


def test_a_pipe_in_the_place_of_the_settings_is_not_waited_for(model_folder, rows, tmp_path):
    every_step = {"train__save_every": "1step"}
    stopped(tmp_path / "run", make_spec(model_folder("llama"), rows, **every_step))
    (tmp_path / "run/config.yaml").unlink()
    os.mkfifo(tmp_path / "run/config.yaml")
    with pytest.raises(UserError, match=r"config\.yaml: it is no regular file"):
        Run.reopen(tmp_path / "run", "train-eval")
    with pytest.raises(UserError, match=r"config\.yaml: it is no regular file"):
        recover(tmp_path / "run", tmp_path / "rescued", Silent())
