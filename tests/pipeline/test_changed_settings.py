"""Runs that go on with other settings, and runs that are done and go on all the same."""

import json
import re

import pytest
from tests.support.data_files import write_rows
from tests.support.small_runs import Heard
from tests.support.whole_jobs import StopsIn, make_spec, run_in, same_adapters, work

from swlora import resumption
from swlora.config import load_spec
from swlora.errors import UserError
from swlora.files import write_text
from swlora.job import Job
from swlora.metrics_file import read_metrics
from swlora.progress import Silent
from swlora.runs import Run, read_run

pytestmark = pytest.mark.usefixtures("no_drawings")
STEADY = {"train__schedule": "constant", "train__warmup_fraction": 0.0}
SAVED = {"train__checkpoint_every_s": 1e-9}


def go_on(folder, flags, *, progress=None, forced=None, command="train"):
    run, spec = Run.reopen(folder, command, flags, forced)
    with run:
        return work(Job(spec, run, progress or Silent()))


def stopped(folder, spec, n=6):
    with pytest.raises(KeyboardInterrupt):
        run_in(folder, spec, "train", progress=StopsIn("train", n))


def test_a_changed_rate_holds_from_there_on_through_further_stops(model_folder, rows, tmp_path):
    spec = make_spec(model_folder("llama"), rows, **SAVED)
    once, twice, heard = tmp_path / "once", tmp_path / "twice", Heard()
    for folder in (once, twice):
        stopped(folder, spec)  # after 4 steps
    go_on(once, {"train.learning_rate": 0.005}, progress=heard)
    with pytest.raises(KeyboardInterrupt):
        go_on(twice, {"train.learning_rate": 0.005}, progress=StopsIn("train", 4))
    go_on(twice, {})
    assert same_adapters(once, twice)
    assert "from step 5 on: train.learning_rate was 0.02 and is now 0.005" in heard.lines
    change = {"step": 4, "settings": {"train.learning_rate": [0.02, 0.005]}}
    for folder in (once, twice):
        assert read_run(folder)["changes"] == [change]
        assert load_spec(folder / "config.yaml", {}).train.learning_rate == 0.005
        assert load_spec(folder / "config.original.yaml", {}) == spec
    plain, lower = tmp_path / "plain", tmp_path / "lower"
    run_in(plain, spec, "train")
    run_in(lower, make_spec(model_folder("llama"), rows, train__learning_rate=0.005), "train")
    rates = {f: [m["learning_rate"] for m in read_metrics(f)] for f in (once, plain, lower)}
    assert rates[once] == rates[plain][:4] + rates[lower][4:]


def test_a_flag_that_names_what_the_run_chose_is_no_change(model_folder, tmp_path):
    """AdaLoRA, which refuses other numbers of steps, goes on, too."""
    many = [{"prompt": f"{k}", "completion": f" is {k % 7}."} for k in range(60)]
    data = (write_rows(tmp_path / "many.jsonl", many),) * 2
    free = {"train__batch_size": None, "train__epochs": None, **SAVED}
    folder, whole = tmp_path / "run", tmp_path / "whole"
    spec = make_spec(model_folder("llama"), data, method="adalora", **free)
    run_in(whole, spec, "train")
    stopped(folder, spec)
    chosen = read_run(folder)["fitted"]
    flags = {f"train.{name}": size for name, size in chosen.items()}
    with pytest.raises(UserError, match="planned its pruning over all its steps, which --epochs"):
        go_on(folder, flags | {"train.epochs": chosen["epochs"] + 1})
    go_on(folder, flags)
    assert same_adapters(folder, whole)
    assert "changes" not in read_run(folder)
    assert load_spec(folder / "config.yaml", {}) == spec
    with pytest.raises(UserError, match="nothing"):
        go_on(folder, flags)


@pytest.mark.parametrize("method", ["lora", "dora", "pissa"])
def test_a_run_that_is_done_goes_on_as_if_it_had_been_longer(method, model_folder, rows, tmp_path):
    spec = make_spec(model_folder("llama"), rows, method=method, train__epochs=2, **STEADY)
    run_in(tmp_path / "longer", spec, "train")
    first = (tmp_path / "longer" / "adapter" / "adapter_model.safetensors").read_bytes()
    result = go_on(tmp_path / "longer", {"train.epochs": 3})
    assert (tmp_path / "longer" / "adapter" / "adapter_model.safetensors").read_bytes() != first
    whole = make_spec(model_folder("llama"), rows, method=method, train__epochs=3, **STEADY)
    expected = run_in(tmp_path / "whole", whole, "train")
    assert same_adapters(tmp_path / "longer", tmp_path / "whole")
    assert result["steps"] == expected["steps"] == 12
    facts = read_run(tmp_path / "longer")
    assert facts["status"] == "done" and facts["changes"][0]["step"] == 8
    assert len(read_metrics(tmp_path / "longer")) == 12


def test_a_run_that_is_done_stays_so_where_nothing_is_left(model_folder, rows, tmp_path):
    folder = tmp_path / "run"
    run_in(
        folder,
        make_spec(model_folder("llama"), rows, train__epochs=None, train__max_steps=3),
        "train",
    )
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(
        UserError, match="has done 3 steps, all that --epochs 3 and --max-steps 3 allow; "
    ):
        go_on(folder, {"train.learning_rate": 0.1})
    with pytest.raises(UserError, match="there is nothing to resume"):
        go_on(folder, {})
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    with pytest.raises(UserError, match="--epochs 9 and --max-steps 3 allow"):
        go_on(folder, {"train.epochs": 9})
    with pytest.raises(UserError, match="there is nothing to resume"):
        go_on(folder, {"train.max_steps": 3})  # as it was
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    go_on(folder, {"train.max_steps": 4})
    assert len(read_metrics(folder)) == 4


def test_a_longer_run_that_is_killed_before_its_configuration_is_written_goes_on(
    model_folder, rows, tmp_path, monkeypatch
):
    """run.json is written first, so that config.yaml is not taken for one that somebody edited."""
    folder = tmp_path / "run"
    run_in(folder, make_spec(model_folder("llama"), rows, train__max_steps=3), "train")

    class Killed(BaseException):
        pass

    def killed(path, text):
        if path.name == "config.yaml":
            raise Killed
        write_text(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(resumption, "write_text", killed)
        patch.setattr(Run, "_end", lambda _run, _error: None)  # nor does a killed one say how
        with pytest.raises(Killed):
            go_on(folder, {"train.max_steps": 5})
    assert read_run(folder)["changes"][0]["settings"] == {"train.max_steps": [3, 5]}
    go_on(folder, {})
    assert len(read_metrics(folder)) == 5
    assert load_spec(folder / "config.yaml", {}).train.max_steps == 5
    assert load_spec(folder / "config.original.yaml", {}).train.max_steps == 3


def test_a_change_holds_for_all_steps_behind_an_older_checkpoint(model_folder, rows, tmp_path):
    """Where the newest one is damaged, an earlier change of a later step shall not undo it."""
    folder = tmp_path / "run"
    stopped(folder, make_spec(model_folder("llama"), rows, **SAVED, **STEADY))  # after 4 steps
    with pytest.raises(KeyboardInterrupt):
        go_on(folder, {"train.weight_decay": 0.1}, progress=StopsIn("train", 1))
    newest = folder / "checkpoint" / "state-4.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    heard = Heard()
    go_on(folder, {"train.learning_rate": 0.005}, progress=heard)
    assert "resuming after step 3" in heard.lines
    rates = [m["learning_rate"] for m in read_metrics(folder)]
    assert rates == [0.02] * 3 + [0.005] * 9
    assert [change["step"] for change in read_run(folder)["changes"]] == [3, 3]


def test_how_often_to_save_is_changed_whatever_said_it_before(model_folder, rows, tmp_path):
    folder = tmp_path / "run"
    stopped(folder, make_spec(model_folder("llama"), rows, **SAVED))
    go_on(folder, {"train.save_every": "100steps"})
    spec = load_spec(folder / "config.yaml", {}).train
    assert (spec.save_every, spec.checkpoint_every_s) == ("100steps", None)


@pytest.mark.parametrize("name, value", [("rank", "8"), ("method", "dora"), ("layers", "last:1")])
def test_no_force_puts_another_adapter_on_a_checkpoint(name, value, model_folder, rows, tmp_path):
    folder = tmp_path / "run"
    stopped(folder, make_spec(model_folder("llama"), rows, **SAVED))
    path, whole = folder / "config.yaml", (folder / "config.yaml").read_text()
    path.write_text(re.sub(rf"(?m)^  {name}: .*$", f"  {name}: {value}", whole, count=1))
    with pytest.raises(UserError, match=rf"no such adapter, so put back adapter\.{name}"):
        go_on(folder, {}, forced=lambda _: None)
    path.write_text(whole)
    go_on(folder, {})  # nothing of it was noted


def test_what_cannot_be_changed_is_refused_by_name(model_folder, rows, tmp_path):
    folder = tmp_path / "run"
    stopped(folder, make_spec(model_folder("llama"), rows, **SAVED))
    with pytest.raises(UserError, match=r"keeps its --rank \(it is 3\), --seed \(it is 0\); leave"):
        go_on(folder, {"adapter.rank": 5, "seed": 4, "train.epochs": 4})
    with pytest.raises(UserError, match=r"keeps its --early-stopping \(it is None\)"):
        go_on(folder, {"train.early_stopping": 4})
    assert "changes" not in read_run(folder)
    go_on(folder, {"adapter.rank": 3, "train.epochs": 3})  # the same is no change
    assert not (folder / "config.original.yaml").exists()


def test_adalora_keeps_its_number_of_steps(model_folder, rows, tmp_path):
    folder = tmp_path / "run"
    stopped(folder, make_spec(model_folder("llama"), rows, method="adalora", **SAVED))
    with pytest.raises(UserError, match=r"adalora has planned .* --epochs would change"):
        go_on(folder, {"train.epochs": 5})


def test_full_training_keeps_no_checkpoint_and_says_where_to_go_on(model_folder, rows, tmp_path):
    folder = tmp_path / "run"
    run_in(folder, make_spec(model_folder("llama"), rows, method="full"), "train")
    assert not (folder / "checkpoint").exists()
    with pytest.raises(UserError, match=r"nor does --method full.*`swlora train --adapter "):
        go_on(folder, {"train.epochs": 5})


def test_a_training_that_ended_early_wants_more_patience(model_folder, rows, tmp_path):
    patient = {"train__early_stopping": 1, "train__eval_every_steps": 1}
    folder = tmp_path / "run"
    spec = make_spec(model_folder("llama"), rows, train__learning_rate=3.0, **patient)
    n_first = run_in(folder, spec, "train")["steps"]
    assert n_first < 12
    with pytest.raises(UserError, match=f"ended early, after {n_first} of 12 steps; a larger"):
        go_on(folder, {"train.epochs": 4})
    go_on(folder, {"train.early_stopping": 100})
    assert len(read_metrics(folder)) == 12


def test_a_kill_between_the_two_files_is_put_right(model_folder, rows, tmp_path):
    spec, folder = make_spec(model_folder("llama"), rows, **SAVED), tmp_path / "run"
    stopped(folder, spec)
    old = (folder / "config.yaml").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        go_on(folder, {"train.learning_rate": 0.005}, progress=StopsIn("train", 3))
    (folder / "config.yaml").write_bytes(old)
    go_on(folder, {})
    assert load_spec(folder / "config.yaml", {}).train.learning_rate == 0.005
    assert len(read_run(folder)["changes"]) == 1


def test_a_changed_configuration_is_noticed(model_folder, rows, tmp_path):
    folder = tmp_path / "run"
    stopped(folder, make_spec(model_folder("llama"), rows, **SAVED))
    path = folder / "config.yaml"
    whole = path.read_text()
    path.write_text(whole.replace("batch_size: 3", "batch_size: 5"))
    expected = r"config.yaml is not as the run left it: train.batch_size was 3 and is now 5; put"
    with pytest.raises(UserError, match=expected):
        go_on(folder, {})
    path.write_text(whole[: whole.index("train:")])
    said = r"train.epochs was 3 and is now not given, .* and \d+ more; put"
    with pytest.raises(UserError, match=said):
        go_on(folder, {})
    path.write_text(whole.replace("batch_size: 3", "batch_size: 5"))
    heard: list[str] = []
    go_on(folder, {}, forced=heard.append)
    assert len(heard) == 1 and "train.batch_size was 3 and is now 5" in heard[0]
    facts = read_run(folder)
    assert facts["forced"][0]["difference"] in heard[0]
    assert facts["changes"] == [{"step": 4, "settings": {"train.batch_size": [3, 5]}}]


def test_other_versions_are_named(model_folder, rows, tmp_path):
    folder = tmp_path / "run"
    stopped(folder, make_spec(model_folder("llama"), rows, **SAVED))
    facts = json.loads((folder / "run.json").read_text())
    facts["packages"]["peft"] = "0.1"
    (folder / "run.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"peft was 0\.1 and is now .* add --force-resume"):
        go_on(folder, {})
    said: list[str] = []
    go_on(folder, {}, forced=said.append)
    assert len(said) == 1 and said[0].startswith("goes on although peft was 0.1")
    assert read_run(folder)["packages"]["peft"] != "0.1"


def test_forced_other_rows_are_told_and_recorded(model_folder, rows, tmp_path):
    folder = tmp_path / "run"
    stopped(folder, make_spec(model_folder("llama"), rows, **SAVED))
    rows[0].write_text("".join(reversed(rows[0].read_text().splitlines(keepends=True))))
    with pytest.raises(UserError, match="cannot go on: data_sha256 was"):
        go_on(folder, {})
    said: list[str] = []
    go_on(folder, {}, forced=said.append)
    assert any("data_sha256 was" in line for line in said)
    assert any("train_tokens_sha256 was" in line for line in said)
    assert len(read_run(folder)["forced"]) == len(said)
