"""The studies that come with the project, and one from the command line to the report."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from swlora.cli import main
from swlora.study.compared import read_finished
from swlora.study.study_file import read_studies
from swlora.study.tables import verdict_columns

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted((ROOT / "studies").glob("*.yaml"))


def test_there_are_studies():
    assert {path.name for path in STUDIES} == {
        "e2e.yaml",
        "e2e-large.yaml",
        "gpt2-e2e.yaml",
        "smoke.yaml",
    }


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_every_study_is_valid(path):
    for study in read_studies(path, {}):
        assert study.problems == []
        assert study.spec.controls


def test_the_gpt2_study_is_of_both_models_and_both_recipes():
    studies = read_studies(ROOT / "studies" / "gpt2-e2e.yaml", {})
    assert [study.name for study in studies] == ["gpt2", "gpt2-medium"]
    for study in studies:
        lora, *_ = study.spec.arms
        run = study.spec.run_spec(lora.overrides)
        # arXiv 2106.09685, table 11
        assert (run.adapter.rank, run.adapter.alpha, run.adapter.dropout) == (4, 32, 0.1)
        assert (run.train.epochs, run.train.batch_size, run.train.label_smoothing) == (5, 8, 0.1)
        assert 2e-4 in study.spec.rate.grid
        assert (run.train.weight_decay, run.train.schedule) == (0.01, "linear")
        beam = study.spec.beam.decode
        assert (beam.num_beams, beam.length_penalty, beam.no_repeat_ngram_size) == (10, 0.9, 4)


def test_the_e2e_study_has_the_arms_that_were_asked_for():
    (study,) = read_studies(ROOT / "studies" / "e2e.yaml", {})
    names = {arm.name: arm.seeds or study.spec.seeds for arm in study.spec.arms}
    assert all(len(names[name]) == 3 for name in ("lora", "super"))
    others = ("lora+", "dora", "adalora", "pissa", "rslora", "full", "supertuning")
    assert names.keys() >= set(others)
    assert study.spec.data.eval_split == "test"


def test_the_large_study_asks_the_question_at_a_size_that_counts():
    (study,) = read_studies(ROOT / "studies" / "e2e-large.yaml", {})
    assert study.spec.seeds == [0, 1, 2] and study.spec.random_draws == 2
    assert study.spec.data.eval_prompts is None  # all MRs of the test set
    assert study.spec.rate.extend > 0
    names = {arm.name for arm in study.spec.arms}
    assert names >= {"lora", "super", "layer-10", "layer-12", "layer-15", "auto", "pissa", "dora"}


@pytest.fixture
def tiny(model_folder, tmp_path, monkeypatch):
    """A study of three arms and two seeds on a random model; without Java, which takes long."""
    bare = os.pathsep.join(
        part for part in os.environ["PATH"].split(os.pathsep) if not (Path(part) / "java").exists()
    )
    monkeypatch.setenv("PATH", bare)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = {
        "model": {"name": str(model_folder("llama")), "dtype": "float32"},
        "data": {"name": "sample", "train_rows": 48, "eval_prompts": 3, "truncate": True},
        "train": {"batch_size": 8, "epochs": 3, "eval_every_steps": 9},
        "decode": {"max_new_tokens": 4},
        "identify": {"windows": 1, "window_tokens": 64, "controls": 2},
        "arms": ["lora", "super", {"name": "last-1", "layers": "2", "rates": [0.01]}],
        "seeds": [0, 1],
        "rate": {"grid": [0.01, 0.02], "train_rows": 16, "eval_prompts": 2},
        "beam": {
            "arms": ["lora"],
            "seeds": [1],
            "decode": {"num_beams": 2, "max_new_tokens": 4},
        },
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["compare", "--config", str(path), "--output", str(tmp_path / "out")]


def test_help_shows_an_example_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom swlora.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'matplotlib', 'numpy'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", code, "compare", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "swlora compare --config studies/e2e.yaml" in done.stdout
    assert done.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Missing option '--config'"),
        (["--config", "gone.yaml"], "cannot read the configuration gone.yaml"),
        (["--config", "bad.yaml", "--dry-run"], "in bad.yaml: arm x: adapter.rank: "),
    ],
)
def test_mistakes_are_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("arms: [lora, {name: x, rank: 0}]")
    with pytest.raises(SystemExit) as end:
        main(["compare", *arguments])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("swlora: ") and said in line
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_says_what_would_happen(tiny, tmp_path, capsys):
    main([*tiny, "--dry-run", "--json", str(tmp_path / "plan.json")])
    shown = capsys.readouterr().out
    assert "super-every" in shown
    assert "14 measured runs, 12 short ones" in shown and "1 evaluations with beam search" in shown
    (plan,) = json.loads((tmp_path / "plan.json").read_text())["studies"]
    assert plan["n_rows"]["train"] == 48
    main([*tiny, "--dry-run", "--no-controls", "--only", "lora,super"])
    shown = capsys.readouterr().out
    assert "no controls" in shown and "super-every" not in shown and "last-1" not in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_study_is_stopped_and_goes_on_to_its_report(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    study = subprocess.Popen([sys.executable, "-m", "swlora", *tiny], stderr=subprocess.PIPE)
    first = out / "runs" / "lora" / "seed-0"
    deadline_s = time.monotonic() + 240
    while not (first / "metrics.jsonl").exists() and time.monotonic() < deadline_s:
        assert study.poll() is None, study.stderr.read()
        time.sleep(0.05)
    study.send_signal(signal.SIGTERM)
    _, said = study.communicate(timeout=120)
    assert study.returncode == 130
    assert b"the same command goes on" in said
    told = json.loads((out / "study.json").read_text())
    assert told["status"] == "cancelled"
    assert told["runs"]["runs/lora/seed-0"]["status"] == "cancelled"
    assert json.loads((first / "run.json").read_text())["status"] == "cancelled"
    n_before = len((first / "metrics.jsonl").read_text().splitlines())

    main([*tiny, "--json", str(tmp_path / "result.json")])
    assert "study tiny: done" in capsys.readouterr().out
    told = json.loads((out / "study.json").read_text())
    assert told["status"] == "done"
    assert {run["status"] for run in told["runs"].values()} == {"done"}
    assert 0 < n_before < 18
    steps = [json.loads(line)["step"] for line in (first / "metrics.jsonl").open()]
    assert steps == list(range(1, 19))
    assert json.loads((first / "run.json").read_text())["resumed"] == 1
    result = json.loads((tmp_path / "result.json").read_text())
    arms = {arm["name"]: arm for arm in result["arms"]}
    assert arms["lora"]["seeds"] == arms["last-1"]["seeds"] == [0, 1]
    assert arms["super"]["seeds"] == []  # a random model has no super weight
    assert "no super weight" in told["arms"]["super"]["reason"]
    assert arms["last-1"]["n_trainable"] * 3 == arms["lora"]["n_trainable"]
    assert {path.name for path in out.glob("*.*")} >= {"results.md", "results.csv", "pareto.svg"}
    assert not (out / ".cache").exists()

    before = json.loads((out / "study.json").read_text())
    main([*tiny])  # the same again: beam search too is found as it was
    assert json.loads((out / "study.json").read_text())["runs"] == before["runs"]


def test_published_results_of_older_versions_are_read() -> None:
    """They name no seeds of a difference; without them a study's page would have no tables."""
    for name in ("e2e", "e2e-large"):
        arms = read_finished(json.loads((ROOT / f"docs/results/{name}.json").read_text()))
        compared = [arm for arm in arms if arm.against_baseline]
        assert compared
        for title, cell in verdict_columns(["bleu", "nll"]):
            assert all(cell(arm) for arm in compared), title
