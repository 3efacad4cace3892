"""Several processes evaluate and identify as one does: the same texts, losses and verdicts."""

import csv
import json
import platform
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.data_files import write_rows
from tests.support.fault_trials import write_inputs
from tests.support.kills import FOLDER, Process
from tests.support.ranks import Ranks
from tests.support.small_runs import ROWS

from swlora.config import dump_yaml, load_spec
from swlora.metrics_file import read_metrics
from swlora.runs import read_run

NAMES_OF_FILES = ("predictions", "figure", "figures", "report")
PROMPTS = 7  # of unequal lengths, each with two references
DEV = [
    {"prompt": f"name[{'abc' * k}], food[{k}]\n", "completion": f"{k} {verb} x."}
    for k in (3, 1, 7, 0, 5, 2, 6)
    for verb in ("has", "sells")
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a training and its evaluation."""
    folder = tmp_path_factory.mktemp("inputs")
    made = write_inputs(folder)
    write_rows(folder / "dev.jsonl", DEV)
    return made | {"decode.max_new_tokens": 8, "decode.batch_size": 3, "data.english": True}


def run(command: str, folder: Path, settings: dict[str, Any], n: int, **changes: Any) -> Path:
    """Run a command in n processes to its end; return the run folder."""
    output = folder / f"of-{n}"
    arguments = [*call(command, folder, settings, **changes), "--output", str(output)]
    if n == 1:
        found = [Process(arguments, folder / "cache-of-1", folder / "log").ends()]
    else:
        found = Ranks(arguments, folder, n).end()
    assert [code for code, _ in found] == [0] * n, found
    assert not any(said.strip() for _, said in found[1:]), found
    return output


def call(command: str, folder: Path, settings: dict[str, Any], **changes: Any) -> list[str]:
    """Write a configuration of what the command takes; return the arguments."""
    path = folder / f"config-{len(list(folder.iterdir()))}.yaml"
    changed = settings | {name.replace("__", "."): value for name, value in changes.items()}
    path.write_text(dump_yaml(load_spec(None, changed)), encoding="utf-8")
    return [command, "--config", str(path)]


def result(output: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "result.json").read_text(encoding="utf-8"))[name]
    return found


def same_numbers(ours: Any, theirs: Any, path: str = "") -> None:
    """Check that two results are equal, numbers to 1e-6, but for their times and places."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), path
        for key in ours:
            if not (key.endswith(("_s", "_bytes")) or key in NAMES_OF_FILES):
                same_numbers(ours[key], theirs[key], f"{path}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), path
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            same_numbers(*pair, f"{path}[{i}]")
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6), path
    else:
        assert ours == theirs, path


def same_evaluation(one: Path, other: Path) -> list[dict[str, Any]]:
    """Check that two evaluations came to the same, prompt by prompt; return what is known of each.

    The losses of a prompt are among it.
    """
    same_numbers(result(one, "eval"), result(other, "eval"))
    ours, theirs = (json.loads((output / "segments.json").read_text()) for output in (one, other))
    same_numbers(ours, theirs)
    ours, theirs = (predictions(output) for output in (one, other))
    same_numbers(ours, theirs)
    return ours


def predictions(output: Path) -> list[dict[str, Any]]:
    """Read predictions.csv, numbers as such."""
    with (output / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    names = [f"{i} {name}" for i, name in enumerate(rows[0])]  # references share a name
    return [dict(zip(names, map(number_or_text, row), strict=True)) for row in rows[1:]]


def number_or_text(text: str) -> float | str:
    return float(text) if re.fullmatch(r"[0-9.e+-]+", text) else text


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"decode__temperature": 1.0},
    "sampled by transformers": {"decode__temperature": 1.0, "decode__no_repeat_ngram_size": 3},
    "beams": {"decode__num_beams": 3},
}


@pytest.mark.parametrize("name", ["greedy", *map(slow, list(WAYS)[1:])])
def test_two_processes_evaluate_as_one(name, inputs, tmp_path):
    one, two = (run("eval", tmp_path, inputs, n, **WAYS[name]) for n in (1, 2))
    rows = same_evaluation(one, two)
    assert len(rows) == PROMPTS
    assert len({tuple(row.values()) for row in rows}) == PROMPTS


def test_more_processes_than_prompts(inputs, tmp_path):
    write_rows(tmp_path / "few.jsonl", DEV[:4])
    settings = inputs | {"data.eval_file": str(tmp_path / "few.jsonl")}
    one, three = (run("eval", tmp_path, settings, n) for n in (1, 3))
    assert len(same_evaluation(one, three)) == 2


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a search in a model with a large weight on which its text depends."""
    folder = tmp_path_factory.mktemp("planted")
    made = write_inputs(folder)
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][5, 7] = 60.0
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 10.0)
    save_file(tensors, path, {"format": "pt"})
    return made | {
        **{"identify.windows": 5, "identify.window_tokens": 96, "identify.controls": 5},
        "identify.max_candidates": 3,
    }


def test_two_processes_identify_as_one(planted, tmp_path):
    one, two = (run("identify", tmp_path, planted, n) for n in (1, 2))
    ours, theirs = (result(output, "identify") for output in (one, two))
    same_numbers(ours, theirs)
    assert [of_one["verdict"] for of_one in ours["candidates"]] == ["super", "none", "none"]
    assert len(ours["candidates"][0]["control_effects_nats"]) == 5  # dealt by turns
    assert len(ours["generations"]["texts"]) == 3


@pytest.mark.slow
def test_more_processes_than_windows(planted, tmp_path):
    one, two = (run("identify", tmp_path, planted | {"identify.windows": 1}, n) for n in (1, 2))
    same_numbers(*(result(output, "identify") for output in (one, two)))


@pytest.mark.slow
def test_two_processes_train_in_the_layers_they_found_and_evaluate_as_one(
    planted, inputs, tmp_path
):
    # Processes sum gradients in another order: each step adds to that, and a perplexity shows it.
    few = {"train.max_steps": 3, "data.english": False}
    settings = inputs | planted | few | {"adapter.layers": "super"}
    one, two = (run("train-eval", tmp_path, settings, n) for n in (1, 2))
    assert result(one, "train")["layers"] == result(two, "train")["layers"] == [1]
    same_evaluation(one, two)


def test_the_best_adapter_and_the_last_step_are_those_of_one_process(inputs, tmp_path):
    """The held-out loss grows from some step on: the training ends there, in all processes."""
    stopping = {"train__eval_every_steps": 1, "train__early_stopping": 2, "train__max_steps": 60}
    more = {"train__learning_rate": 0.1, "train__epochs": 20}
    one, two = (run("train", tmp_path, inputs, n, **stopping, **more) for n in (1, 2))
    losses = [[m["eval_nll"] for m in read_metrics(output)] for output in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert 2 < len(losses[0]) == len(losses[1]) < 60
    best = [result(output, "train")["held_out"]["best_step"] for output in (one, two)]
    assert best[0] == best[1] == len(losses[0]) - 2


def ends_in_one_line(found: list[tuple[int, str]], code: int, words: str) -> None:
    lines = [line for _, said in found for line in said.splitlines() if "swlora:" in line]
    assert len(lines) == 1, found
    assert re.search(words, lines[0]), lines
    assert found[0][0] == code


@pytest.mark.parametrize("what", ["data", slow("weights"), slow("adapter")])
def test_other_inputs_on_one_process_are_named(what, inputs, planted, tmp_path):
    arguments, places = {}, {}
    for rank in range(2):
        folder = tmp_path / f"machine-{rank}"
        folder.mkdir()
        write_rows(folder / "rows.jsonl", ROWS[rank if what == "data" else 0 :])
        model = (planted if rank and what == "weights" else inputs)["model.name"]
        (folder / "model").symlink_to(model)
        places[rank] = {FOLDER: str(folder)}
        changes = {"data__eval_file": "rows.jsonl", "model__name": "./model"}
        arguments[rank] = call("eval", tmp_path, inputs, **changes)
        if what == "adapter":
            arguments[rank] += ["--adapter", "adapter"]
    if what == "adapter":
        made = run("train", tmp_path, inputs, 1, train__max_steps=1) / "adapter"
        (tmp_path / "machine-0" / "adapter").symlink_to(made)
    words = {
        "data": r"rank 1 on .* has other data than rank 0: dev_tokens_sha256",
        "weights": r"rank 1 on .* has other weights than rank 0: weights_sample_sha256",
        "adapter": r"rank 1 on .*: .*adapter",
    }
    found = Ranks(arguments, tmp_path, 2, places).end()
    ends_in_one_line(found, 2, words[what])


@pytest.mark.slow
def test_a_killed_process_ends_the_evaluation_with_its_name(inputs, tmp_path):
    """Killed while both generate: what follows would take minutes."""
    settings = inputs | {"decode.max_new_tokens": 200, "decode.batch_size": 1}
    write_rows(
        tmp_path / "many.jsonl", [{"prompt": f"{i}\n", "completion": "x"} for i in range(999)]
    )
    settings |= {"data.eval_file": str(tmp_path / "many.jsonl")}
    arguments = [*call("eval", tmp_path, settings), "--output", str(tmp_path / "run")]
    ranks = Ranks(arguments, tmp_path)
    until_s = time.monotonic() + 60
    while not (tmp_path / "run" / "run.json").exists():
        assert time.monotonic() < until_s
        time.sleep(0.05)
    start_s = time.monotonic()
    assert ranks.processes[1].kill_after(2.0)
    found = ranks.end()
    assert time.monotonic() - start_s < 32
    assert found[1][0] == -signal.SIGKILL
    ends_in_one_line(found, 1, rf"rank 1 on {platform.node()} \(process \d+\) is gone")
    assert read_run(tmp_path / "run")["status"] == "failed"
