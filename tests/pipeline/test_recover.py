"""The adapter of a training that did not end: the one that it would have saved at that step."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.support.data_files import write_rows
from tests.support.small_runs import ROWS, same_weights
from tests.support.whole_jobs import StopsIn, make_spec, resume, run_in, same_adapters

from swlora.adapters.saved import read_facts
from swlora.cli import main
from swlora.config import dump_yaml
from swlora.errors import UserError
from swlora.locks import lock_folder
from swlora.progress import Silent
from swlora.recovery import recover
from swlora.run_settings import flat
from swlora.runs import read_run

pytestmark = pytest.mark.usefixtures("no_drawings")
STEADY = {"train__schedule": "constant", "train__warmup_fraction": 0.0}


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "full", "rslora", "lora+"])
def test_it_is_the_adapter_of_a_training_that_ended_there(method, model_folder, rows, tmp_path):
    settings = STEADY | {"method": method, "train__checkpoint_every_s": 1e-9}
    spec = make_spec(model_folder("llama"), rows, **settings)
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run_in(stopped, spec, "train", progress=StopsIn("train", 7))
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    recovered = recover(stopped, tmp_path / "rescued", Silent())
    assert (recovered.step, recovered.n_steps) == (5, 12)
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    five_steps = make_spec(model_folder("llama"), rows, **settings, train__max_steps=5)
    run_in(tmp_path / "five", five_steps, "train")
    assert same_weights(tmp_path / "rescued", tmp_path / "five" / "adapter")
    assert read_facts(tmp_path / "rescued")["step"] == 5
    assert "recovered after step 5 of 12" in (tmp_path / "rescued" / "README.md").read_text()
    resume(stopped)
    run_in(tmp_path / "whole", spec, "train")
    assert same_adapters(stopped, tmp_path / "whole")


@pytest.mark.parametrize(
    "setting",
    [{"report_to": ["tensorboard"]}, {"sample_prompts": ["gone.txt"]}, {"shard": True}],
    ids=str,
)
def test_what_told_of_the_run_or_shared_its_weights_need_not_be_there(
    setting, model_folder, rows, tmp_path
):
    """Neither trackers nor samples nor other processes make another checkpoint."""
    settings = STEADY | {"train__checkpoint_every_s": 1e-9}
    spec, stopped = make_spec(model_folder("llama"), rows, **settings), tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run_in(stopped, spec, "train", progress=StopsIn("train", 3))
    recover(stopped, tmp_path / "plain", Silent())
    told = spec.model_copy(update={"train": spec.train.model_copy(update=setting)})
    facts = json.loads((stopped / "run.json").read_text())
    (stopped / "run.json").write_text(json.dumps(facts | {"settings": flat(told)}))
    (stopped / "config.yaml").write_text(dump_yaml(told))
    recover(stopped, tmp_path / "rescued", Silent())
    assert same_weights(tmp_path / "rescued", tmp_path / "plain")


def test_layers_that_were_measured_are_not_measured_again(model_folder, rows, tmp_path):
    spec = make_spec(
        model_folder("llama"),
        rows,
        **{"adapter__layers": "auto:0.5", "train__checkpoint_every_s": 1e-9},
    )
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run_in(stopped, spec, "train", progress=StopsIn("train", 3))
    result = json.loads((stopped / "result.json").read_text())
    chosen = [2] if result["layer_choice"]["layers"] != [2] else [1]
    result["layer_choice"]["layers"] = chosen
    (stopped / "result.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match="belongs to another adapter"):
        recover(stopped, tmp_path / "rescued", Silent())
    assert not (tmp_path / "rescued").exists()


def test_the_command_says_what_it_made(model_folder, rows, tmp_path, capsys):
    spec = make_spec(model_folder("llama"), rows, train__checkpoint_every_s=1e-9)
    stopped, rescued = tmp_path / "stopped", tmp_path / "rescued"
    with pytest.raises(KeyboardInterrupt):
        run_in(stopped, spec, "train", progress=StopsIn("train", 5))
    main(["recover", str(stopped), "--output", str(rescued), "--json", str(tmp_path / "r.json")])
    said = capsys.readouterr().out
    assert "recovered the adapter after step 3 of 12" in said and f"adapter: {rescued}" in said
    assert json.loads((tmp_path / "r.json").read_text())["step"] == 3
    with pytest.raises(SystemExit) as failed:
        main(["recover", str(stopped), "--output", str(rescued)])
    assert failed.value.code == 2
    assert capsys.readouterr().err.strip().endswith("is not empty; choose another --output")


def test_what_holds_nothing_to_recover_is_refused(model_folder, rows, tmp_path):
    spec = make_spec(model_folder("llama"), rows, train__max_steps=1)
    run_in(tmp_path / "done", spec, "train")
    with pytest.raises(UserError, match=r"came to its end: its adapter is .*done/adapter"):
        recover(tmp_path / "done", tmp_path / "rescued", Silent())
    with pytest.raises(UserError, match=r"holds no readable run.json"):
        recover(tmp_path, tmp_path / "rescued", Silent())
    run_in(tmp_path / "found", spec, "identify")
    with pytest.raises(UserError, match="a run of identify, which trains no adapter"):
        recover(tmp_path / "found", tmp_path / "rescued", Silent())
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "early", spec, "train", progress=StopsIn("train", 1))
    assert read_run(tmp_path / "early")["status"] == "cancelled"
    with pytest.raises(UserError, match="no step of it was kept"):
        recover(tmp_path / "early", tmp_path / "rescued", Silent())


@pytest.mark.parametrize("what", ["rows", "weights"])
def test_other_data_or_weights_are_not_taken_for_those_of_the_run(
    what, model_folder, rows, tmp_path
):
    model = Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))
    spec, stopped = make_spec(model, rows, train__checkpoint_every_s=1e-9), tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run_in(stopped, spec, "train", progress=StopsIn("train", 3))
    if what == "rows":
        write_rows(rows[0], [*ROWS[1:], ROWS[0]])
    else:
        tensors = load_file(model / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"] *= 1.5
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"is of other work: .*; .*put"):
        recover(stopped, tmp_path / "rescued", Silent())
    assert not (tmp_path / "rescued").exists()


def test_a_run_that_is_at_work_is_left_to_it(model_folder, rows, tmp_path):
    spec = make_spec(model_folder("llama"), rows, train__checkpoint_every_s=1e-9)
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run_in(stopped, spec, "train", progress=StopsIn("train", 3))
    held = lock_folder(stopped)
    with pytest.raises(UserError, match="another process is at work"):
        recover(stopped, tmp_path / "rescued", Silent())
    held.release()


def test_no_adapter_is_made_with_settings_that_were_edited(model_folder, rows, tmp_path):
    """Another alpha fits the checkpoint, and would be another adapter."""
    spec = make_spec(model_folder("llama"), rows, train__checkpoint_every_s=1e-9)
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run_in(stopped, spec, "train", progress=StopsIn("train", 3))
    path, alpha = stopped / "config.yaml", spec.adapter.alpha
    path.write_text(path.read_text().replace(f"alpha: {alpha}", "alpha: 3.5"))
    with pytest.raises(UserError, match=rf"adapter.alpha was {alpha} and is now 3.5; put that"):
        recover(stopped, tmp_path / "rescued", Silent())
    assert not (tmp_path / "rescued").exists()
