"""Several processes train as one does: the same adapter, and what one of them meets ends all."""

import json
import platform
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tests.support.data_files import write_rows
from tests.support.fault_trials import write_inputs
from tests.support.kills import FOLDER, Process
from tests.support.ranks import Ranks, signal_itself
from tests.support.small_runs import ROWS, same_weights, weights

from swlora.config import dump_yaml, load_spec
from swlora.metrics_file import read_metrics
from swlora.runs import read_run
from swlora.training.checkpoint import steps_done

STEPS = 50


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of 50 steps of 5 rows, which are one or two prompts."""
    made = write_inputs(tmp_path_factory.mktemp("inputs"))
    return made | {"train.batch_size": 5, "train.max_steps": STEPS, "train.epochs": 20}


def config(folder: Path, settings: dict[str, Any], **changes: Any) -> list[str]:
    """Write a configuration; return the arguments of a training by it."""
    path = folder / f"config-{len(list(folder.iterdir()))}.yaml"
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    path.write_text(dump_yaml(load_spec(None, {**settings, **changed})), encoding="utf-8")
    return ["train", "--config", str(path)]


def train(arguments: list[str], folder: Path, n: int, name: str) -> Path:
    """Train in n processes to the end; return the run folder."""
    if n == 1:
        found = [
            Process([*arguments, "--output", str(folder / name)], folder, folder / "log").ends()
        ]
    else:
        found = Ranks([*arguments, "--output", str(folder / name)], folder, n).end()
    assert [code for code, _ in found] == [0] * n, found
    return folder / name


def distance(one: Path, other: Path) -> float:
    """How far two adapters are from each other, relative to the norm of the first."""
    a, b = weights(one / "adapter"), weights(other / "adapter")
    assert a.keys() == b.keys()
    apart = sum(float((a[name].double() - b[name].double()).square().sum()) for name in a)
    return float((apart / sum(float(w.double().square().sum()) for w in a.values())) ** 0.5)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, plain": {"train__engine": "plain"},
    "lora, neighbours": {"train__order": "neighbours", "train__row_tokens": 64},
    "dora": {"adapter__method": "dora"},
    "adalora": {"adapter__method": "adalora"},
}


@pytest.mark.parametrize("name", ["lora", *(slow(name) for name in METHODS if name != "lora")])
def test_two_processes_come_to_the_adapter_of_one(name, inputs, tmp_path):
    arguments = config(tmp_path, inputs, **METHODS[name])
    one, two = (train(arguments, tmp_path, n, f"of-{n}") for n in (1, 2))
    assert distance(one, two) < 1e-6
    ours, theirs = read_metrics(one), read_metrics(two)
    assert [m["n_tokens"] for m in ours] == [m["n_tokens"] for m in theirs]
    assert [m["rows"] for m in ours] == [m["rows"] for m in theirs]
    assert [m["sum_nats"] for m in ours] == pytest.approx([m["sum_nats"] for m in theirs], rel=1e-5)
    measured = [[m["eval_nll"] for m in both if "eval_nll" in m] for both in (ours, theirs)]
    assert len(measured[0]) == 5
    assert measured[0] == pytest.approx(measured[1], rel=1e-5)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), slow(2, 3)])
@pytest.mark.parametrize("method", ["lora", slow("adalora")])
def test_a_stopped_run_goes_on_in_another_number_of_processes(
    method, before, after, inputs, tmp_path
):
    """SIGTERM to one process stops all after the same step, with a checkpoint."""
    arguments = config(tmp_path, inputs, adapter__method=method, train__save_every="1h")
    whole = train(arguments, tmp_path, 1, "whole")
    folder = tmp_path / "stopped"
    stopping = {before - 1: signal_itself(signal.SIGTERM, 20)}
    found = Ranks([*arguments, "--output", str(folder)], tmp_path, before, stopping).end()
    assert [code for code, _ in found] == [130] * before, found
    n_done = steps_done(folder / "checkpoint")
    assert n_done in (20, 21)  # the wish is heard with the sum of a step
    assert f"stopped after step {n_done} of {STEPS}" in found[0][1]
    assert not any("swlora:" in said for _, said in found[1:])
    assert read_run(folder)["status"] == "cancelled"
    again = ["train", "--resume", "--output", str(folder)]
    if after == 1:
        found = [Process(again, tmp_path, tmp_path / "log").ends()]
    else:
        found = Ranks(again, tmp_path, after).end()
    assert [code for code, _ in found] == [0] * after, found
    assert distance(whole, folder) < 1e-6
    assert [m["step"] for m in read_metrics(folder)] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_dropout_is_drawn_anew_and_resumed_to_the_same_bits(inputs, tmp_path):
    arguments = config(tmp_path, inputs, adapter__dropout=0.3, train__max_steps=12)
    whole, again = (train(arguments, tmp_path, 2, name) for name in ("whole", "again"))
    assert same_weights(whole / "adapter", again / "adapter")
    folder = tmp_path / "stopped"
    stopping = {0: signal_itself(signal.SIGTERM, 5)}
    Ranks([*arguments, "--output", str(folder)], tmp_path, 2, stopping).end()
    found = Ranks(["train", "--resume", "--output", str(folder)], tmp_path).end()
    assert [code for code, _ in found] == [0, 0], found
    assert same_weights(whole / "adapter", folder / "adapter")


@pytest.mark.parametrize("killed", [1, slow(0)])
def test_a_killed_process_ends_all_with_its_name(killed, inputs, tmp_path):
    arguments = config(tmp_path, inputs, train__save_every="1step")
    folder, start_s = tmp_path / "run", time.monotonic()
    dying = {killed: signal_itself(signal.SIGKILL, 10)}
    ranks = Ranks([*arguments, "--output", str(folder)], tmp_path, 2, dying)
    found = ranks.end(deadline_s=60.0)
    assert time.monotonic() - start_s < 45  # the imports and 10 steps, and less than 30 s after
    code, said = found[1 - killed]
    assert found[killed][0] == -signal.SIGKILL
    assert code == 1
    lines = [line for line in said.splitlines() if line.startswith("swlora:")]
    assert len(lines) == 1
    if killed == 1:
        assert f"rank 1 on {platform.node()}" in lines[0]
        assert "is gone" in lines[0]
        assert read_run(folder)["status"] == "failed"
    n_done = steps_done(folder / "checkpoint")
    assert n_done in (9, 10)
    whole = train(arguments, tmp_path, 1, "whole")
    found = Ranks(["train", "--resume", "--output", str(folder)], tmp_path).end()
    assert [code for code, _ in found] == [0, 0], found
    assert distance(whole, folder) < 1e-6


def ends_in_one_line(found: list[tuple[int, str]], code: int, words: str) -> None:
    """Check that all ended with a code, and the first process alone said why."""
    assert [own for own, _ in found] == [code] * len(found), found
    lines = [line for _, said in found for line in said.splitlines() if "swlora:" in line]
    assert len(lines) == 1, lines
    assert re.search(words, lines[0]), lines
    assert "swlora:" in found[0][1]


def test_other_data_on_one_process_are_named(inputs, tmp_path):
    arguments = config(tmp_path, inputs, data__name="rows.jsonl")
    places = {}
    for rank in range(2):
        folder = tmp_path / f"machine-{rank}"
        folder.mkdir()
        write_rows(folder / "rows.jsonl", ROWS[rank:])
        places[rank] = {FOLDER: str(folder)}
    output = ["--output", str(tmp_path / "run")]
    found = Ranks([*arguments, *output], tmp_path, 2, places).end()
    ends_in_one_line(found, 2, r"rank 1 on .* has other data than rank 0: train_tokens_sha256")
    assert not (tmp_path / "run").exists()


def test_other_settings_on_one_process_are_named(inputs, tmp_path):
    arguments = {
        rank: [*config(tmp_path, inputs, train__learning_rate=rate), "--output", f"{tmp_path}/run"]
        for rank, rate in enumerate((0.01, 0.02))
    }
    found = Ranks(arguments, tmp_path).end()
    words = r"rank 1 on .* has other settings than rank 0: train.learning_rate is 0.02 there and"
    ends_in_one_line(found, 2, words)


def test_a_mistyped_option_is_said_once(tmp_path):
    found = Ranks(["train", "--learning-rat", "1"], tmp_path).end()
    ends_in_one_line(found, 2, "No such option: --learning-rat")


def test_a_run_that_goes_on_with_another_place_of_its_adapter(inputs, tmp_path):
    """Paths are compared, too."""
    before = train(config(tmp_path, inputs, train__max_steps=2), tmp_path, 1, "before")
    arguments = ["train", "--resume", "--output", f"{tmp_path}/none", "--adapter"]
    found = Ranks([*arguments, str(before / "adapter")], tmp_path).end()
    ends_in_one_line(found, 2, "swlora: .*none")
    found = Ranks({0: [*arguments, "a"], 1: [*arguments, "b"]}, tmp_path).end()
    ends_in_one_line(found, 2, "other settings than rank 0: adapter.start is 'b' there and 'a'")


def test_more_processes_than_sequences_in_a_step(inputs, tmp_path):
    arguments = config(tmp_path, inputs, train__batch_size=2)
    found = Ranks([*arguments, "--output", str(tmp_path / "run")], tmp_path, 3).end()
    ends_in_one_line(found, 2, "a step has 2 sequences, fewer than the 3 processes: start 2 .*")
    assert not (tmp_path / "run").exists()


def test_an_error_of_one_process_ends_all(inputs, tmp_path):
    arguments = {0: config(tmp_path, inputs), 1: config(tmp_path, inputs)}
    arguments[1][2] = f"{tmp_path}/none.yaml"
    arguments[0] += ["--output", str(tmp_path / "run")]
    found = Ranks(arguments, tmp_path).end()
    ends_in_one_line(found, 2, r"rank 1 on .*none.yaml")


def test_an_error_of_all_processes_is_said_once(inputs, tmp_path):
    arguments = config(tmp_path, inputs, model__name=f"{tmp_path}/none")
    found = Ranks([*arguments, "--output", str(tmp_path / "run")], tmp_path).end()
    ends_in_one_line(found, 2, "swlora: there is no model folder")


def test_the_world_is_as_large_as_asked(inputs, tmp_path):
    asked = [*config(tmp_path, inputs), "--processes", "2", "--output", str(tmp_path / "run")]
    code, said = Process(asked, tmp_path, tmp_path / "log").ends()
    assert code == 2
    assert "--processes 2, and there is 1: start with torchrun --nproc-per-node 2" in said
    ends_in_one_line(Ranks(asked, tmp_path, 3).end(), 2, "--processes 2, and there are 3")


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["auto:0.9", "last:2"])
def test_layers_that_one_process_chooses_are_those_of_all(layers, inputs, tmp_path):
    arguments = config(tmp_path, inputs, adapter__layers=layers, train__max_steps=3)
    folder = train(arguments, tmp_path, 2, "run")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    layers_there = {name.split(".layers.")[1].split(".")[0] for name in weights(folder / "adapter")}
    assert {int(layer) for layer in layers_there} == set(result["train"]["layers"])


TRIES_RATES = {  # six steps an epoch, of which one can be held out
    **{"train__learning_rate": None, "train__find_learning_rate": True},
    **{"train__batch_size": 2, "train__max_steps": 3},
}


def test_a_rate_that_one_process_finds_is_that_of_all(inputs, tmp_path):
    run = train(config(tmp_path, inputs, **TRIES_RATES), tmp_path, 2, "found")
    assert "of trying rates" in (tmp_path / "log-0").read_text(encoding="utf-8")
    rate = read_run(run)["fitted"]["learning_rate"]
    given = TRIES_RATES | {"train__learning_rate": rate, "train__find_learning_rate": False}
    same = train(config(tmp_path, inputs, **given), tmp_path, 2, "given")
    assert same_weights(run / "adapter", same / "adapter")


def test_a_trial_that_is_made_to_fit_into_memory_waits_for_nobody(inputs, tmp_path):
    """What its steps take is measured, by all processes in a training and by one in a trial."""
    arguments = config(tmp_path, inputs, **TRIES_RATES, model__memory_gb=0.001)
    train(arguments, tmp_path, 2, "run")
    said = (tmp_path / "log-0").read_text(encoding="utf-8")
    assert "of trying rates" in said and "with the same gradient" in said


def test_weights_that_are_no_numbers_end_all_with_the_rows_named(inputs, tmp_path):
    arguments = config(tmp_path, inputs, train__learning_rate=1e36, train__warmup_fraction=0)
    folder = tmp_path / "run"
    found = Ranks([*arguments, "--output", str(folder)], tmp_path).end()
    ends_in_one_line(found, 1, r"step \d+ .* \(rows of that step: .*train.jsonl, line \d")
    assert read_run(folder)["error"]["code"] == "diverged"


@pytest.mark.parametrize("command", ["compare", slow("serve"), slow("generate")])
def test_a_command_for_one_process_says_so(command, tmp_path):
    asked = {
        "compare": ["compare", "--config", "study.yaml"],
        "serve": ["serve"],
        "generate": ["generate", "--prompt", "good day"],
    }
    found = Ranks(asked[command], tmp_path).end()
    words = f"swlora {command} works in one process, and the launcher started 2: start it without"
    ends_in_one_line(found, 2, words)
