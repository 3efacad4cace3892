"""The command line as a person uses it."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from swlora.config import load_spec
from swlora.layer_policy import parse_policy
from swlora.runs import read_run

VERBS = ["identify", "train", "eval", "train-eval", "score", "generate"]
OTHERS = ["data", "compare", "chat", "serve", "cache"]  # which leave no run folder
RUN_VERBS = ["identify", "train", "eval", "train-eval"]


# Help


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_an_example(verb, swlora):
    done = swlora(verb, "--help")
    assert done.code == 0
    assert re.search(rf"Example:\s+`?swlora {verb} --", done.out)
    of_a_model = () if verb == "score" else ("--config", "--seed")
    for flag in ("--json", "--output", "--debug", *of_a_model):
        assert flag in done.out
    if verb == "score":  # which nothing random or configured is part of
        assert "--seed" not in done.out and "--config" not in done.out


def test_help_names_every_verb_and_imports_nothing_heavy():
    """A fresh process, since this one has imported everything long ago."""
    code = (
        "import sys\nfrom swlora.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'matplotlib', 'numpy'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))\n"
    )
    for arguments in ([], ["data"], *([verb] for verb in VERBS)):
        command = [sys.executable, "-c", code, *arguments, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "HEAVY []"
        if not arguments:
            assert all(re.search(rf"│ {verb} ", done.stdout) for verb in [*VERBS, *OTHERS])


def test_the_version(swlora):
    done = swlora("--version")
    assert (done.code, done.out) == (0, f"swlora {importlib.metadata.version('swlora')}\n")
    code = "import sys, swlora\nassert 'torch' not in sys.modules\nprint(swlora.__version__)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert done.out == f"swlora {printed}"


@pytest.mark.parametrize("verb", ["train", "train-eval"])
def test_help_names_every_layer_policy(verb, swlora, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    (line,) = [s for s in swlora(verb, "--help").out.splitlines() if "│ --layers " in s]
    for example in ("2,11", "all", "super", "super+removal", "auto:0.5", "last:4", "first:4"):
        assert example in line
        parse_policy(example)
    assert "every:4" in line and "random:4:SEED" in line


@pytest.mark.parametrize("verb", OTHERS)
def test_every_other_verb_shows_an_example_too(verb, swlora):
    done = swlora(verb, "--help")
    assert done.code == 0
    assert re.search(rf"Example:\s+`?swlora {verb} --", done.out)
    assert "--debug" in done.out


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("swlora tra", ["train", "train-eval"]),
        ("swlora train --lea", ["--learning-rate"]),
        ("swlora eval --deb", ["--debug"]),
    ],
)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_is_told_how_a_word_goes_on(shell, typed, offered):
    asked = {
        "_SWLORA_COMPLETE": f"complete_{shell}",
        **{"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))},  # bash
        "_TYPER_COMPLETE_ARGS": typed,
        **{"_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }
    command = [sys.executable, "-m", "swlora"]
    done = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True)
    words = re.findall(r'"([^"]+)":"' if shell == "zsh" else r"^(\S+)", done.stdout, re.MULTILINE)
    assert words == offered


def test_completion_can_be_shown_and_installed(tmp_path):
    # Else Typer goes by the shell that started us, such as the sh of make, and not by the name.
    named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    environment = {**os.environ, **named, "HOME": str(tmp_path)}
    for flag in ("--show-completion", "--install-completion"):
        command = [sys.executable, "-m", "swlora", flag, "bash"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        if flag == "--show-completion":
            script = done.stdout.strip()
    assert "_SWLORA_COMPLETE=complete_bash" in script
    assert (tmp_path / ".bash_completions" / "swlora.sh").read_text().strip() == script
    assert "swlora.sh" in (tmp_path / ".bashrc").read_text()


def test_no_verb_at_all(swlora):
    done = swlora()
    assert done.code == 2
    assert "train-eval" in done.out + done.err


# Runs


def test_train_then_eval_then_generate(swlora, small, model_folder, rows):
    done = swlora("train", *small, "--layers", "0", "--layers", "2", "--output", "run")
    assert done.code == 0
    assert "adapter: run/adapter\nrun folder: run\n" in done.out
    assert f"model: the folder {model_folder('llama')}\n" in done.err
    assert "training 1,536 weights (lora) in layers 0, 2 on 6 rows\n" in done.err
    assert "Warning" not in done.err
    config = json.loads(Path("run/adapter/adapter_config.json").read_text())
    assert config["layers_to_transform"] == [0, 2]

    base = ["--model", model_folder("llama"), "--dtype", "float32", "--max-new-tokens", 5]
    done = swlora("eval", *base, "--adapter", "run", "--dataset", rows, "--output", "ev")
    assert done.code == 0
    assert re.search(r"^BLEU +\d+\.\d$", done.out, re.MULTILINE)
    assert "METEOR         n/a  (Java is left out here)\n" in done.out
    assert "only 1 prompt: the scores say little of other prompts" in done.out
    assert "PPL" not in done.out
    assert "No such option: --english" in swlora("train", *small, "--english").mistake
    assert "predictions: ev/predictions.csv\nrun folder: ev\n" in done.out
    assert read_run(Path("ev"))["command"] == "eval"

    done = swlora("generate", *base, "--adapter", "run", "--prompt", "p1", "--json", "g.json")
    assert done.code == 0
    result = json.loads(Path("g.json").read_text())
    assert result["text"] + "\n" == done.out
    assert result["prompt"] == "p1"
    assert not Path("runs").exists()  # a run folder only where one was asked for
    assert swlora("generate", *base, "--prompt", "p1", "--output", "gen").code == 0
    assert json.loads(Path("gen/result.json").read_text())["prompt"] == "p1"
    assert read_run(Path("gen"))["status"] == "done"


def test_without_output_a_run_gets_a_folder_of_its_own(swlora, small):
    for _ in range(2):
        assert swlora("train", *small).code == 0
    assert len(list(Path("runs").glob("train-*/adapter"))) == 2


def test_train_eval_leaves_everything(swlora, small):
    flags = ["--max-new-tokens", 5, "--targets", "q_proj,down_proj", "--targets", "up_proj"]
    done = swlora("train-eval", *small, *flags, "--output", "a/run", "--json", "b/result.json")
    assert done.code == 0
    result = json.loads(Path("b/result.json").read_text())
    assert set(result) == {"train", "eval"}
    left = json.loads(Path("a/run/result.json").read_text())
    assert left.pop("data")["train"]["n_rows"] > 0
    assert left == result
    spec = load_spec(Path("a/run/config.yaml"), {})
    assert spec.adapter.targets == ["q_proj", "down_proj", "up_proj"]
    assert {path.name for path in Path("a/run").iterdir()} >= {"adapter", "loss.png", "run.json"}
    facts = read_run(Path("a/run"))
    assert (facts["status"], facts["command"]) == ("done", "train-eval")


def test_flags_win_over_the_file(swlora, small, tmp_path):
    text = "adapter: {rank: 5, alpha: 3, layers: [0, 1]}\nseed: 4\n"
    (tmp_path / "c.yaml").write_text(text)
    done = swlora("train", *small, "--config", "c.yaml", "--layers", "2", "--output", "run")
    assert done.code == 0
    spec = load_spec(Path("run/config.yaml"), {})
    assert (spec.adapter.rank, spec.adapter.alpha, spec.seed) == (2, 3, 4)
    assert str(spec.adapter.layers) == "2"
    assert (tmp_path / "c.yaml").read_text() == text


def test_the_configuration_of_a_run_repeats_it(swlora, small):
    swlora("train", *small, "--seed", "9", "--output", "one")
    assert swlora("train", "--config", "one/config.yaml", "--output", "two").code == 0
    weights = "adapter/adapter_model.safetensors"
    assert Path("one", weights).read_bytes() == Path("two", weights).read_bytes()
    assert Path("one/config.yaml").read_text() == Path("two/config.yaml").read_text()


def test_identify(swlora, model_folder):
    flags = ["--model", model_folder("gpt2"), "--windows", 1, "--window-tokens", 32]
    done = swlora("identify", *flags, "--figure", "f.svg", "--json", "i.json", "--output", "run")
    assert done.code == 0
    result = json.loads(Path("i.json").read_text())
    assert set(result) >= {"layers", "candidates", "perplexity", "thresholds", "modules"}
    first, header, *lines = done.out.splitlines()
    assert first == f"perplexity of the intact model: {result['perplexity']:.2f}"
    assert re.split(r"  +", header) == [
        *("layer", "module", "out", "in", "weight", "ratio", "95 %", "control", "agree", "verdict")
    ]
    for c, line in zip(result["candidates"], lines, strict=False):
        address = [str(c[key]) for key in ("layer", "module", "out_channel", "in_channel")]
        low, high = c["interval"]
        measured = [f"{c['weight']:.3f}", f"{c['ratio']:.2f}", f"{low:.2f} to {high:.2f}"]
        agree = f"{round(c['agreement'] * 6)}/6"
        assert re.split(r"  +", line) == [*address, *measured, "-", agree, c["verdict"]]
    n = len(result["candidates"])
    assert (
        lines[n]
        == "no super weight: setting any one candidate to zero barely matters in this model"
    )
    assert lines[n + 1].startswith(f"all {n} candidates zeroed together: ratio ")
    assert lines[n + 2] == "no massive activation in 3 prompts, with and without BOS"
    assert lines[n + 3 :] == ["report: run/superweights.md", "figure: f.svg", "run folder: run"]
    assert Path("run/superweights-path.svg").exists()
    assert Path("f.svg").read_text().startswith("<?xml")
    assert "must end in .png, .svg" in swlora("identify", *flags, "--figure", "f.xyz").mistake
    chosen = ["--prompt", "One, two", "--prompt", "three", "--controls", 2, "--max-candidates", 1]
    assert swlora("identify", *flags, *chosen, "--json", "p.json", "--output", "p").code == 0
    result = json.loads(Path("p.json").read_text())
    assert result["prompts"] == ["One, two", "three"]
    assert (result["n_controls"], len(result["candidates"])) == (2, 1)
    deep = swlora("identify", *flags, *chosen, "--deep", "--output", "deep")
    assert "there is nothing that --deep could measure" in deep.err
    flags[-1] = 300
    assert "exceeds the model's context of 256" in swlora("identify", *flags).mistake


def test_identify_with_an_adapter(swlora, model_folder, rows):
    flags = ["--model", model_folder("llama"), "--windows", 1, "--window-tokens", 32]
    flags += ["--controls", 2, "--max-candidates", 1, "--prompt", "one"]
    trained = ["--dataset", rows, "--layers", "1", "--max-steps", 1, "--output", "trained"]
    assert swlora("train", *flags[:2], *trained).code == 0
    done = swlora("identify", *flags, "--adapter", "trained", "--output", "run")
    assert done.code == 0
    said = "with the adapter in trained/adapter: layers with a verified super weight: none"
    assert said in done.out
    result = json.loads(Path("run/result.json").read_text())["identify"]
    assert set(result["fine_tuned"]) == {
        *("adapter", "weights", "activations", "sinks_before", "sinks_after", "after")
    }
    assert "## Before and after fine-tuning" in Path("run/superweights.md").read_text()
    facts = json.loads(Path("run/run.json").read_text())
    assert facts["adapter"] == "trained/adapter" and len(facts["adapter_sha256"]) == 64
    for folder, mistake in (
        ("gone", "there is no adapter folder gone"),
        (".", "is no adapter folder: it holds no adapter_config.json"),
    ):
        assert mistake in swlora("identify", *flags, "--adapter", folder).mistake
    flags[1] = model_folder("gpt2")
    done = swlora("identify", *flags, "--adapter", "trained", "--output", "other")
    assert "cannot be merged: the model has no module model.layers.1" in done.mistake
    assert not Path("other").exists()


def test_score(swlora):
    Path("p.txt").write_text("A serves food.\nB is cheap.\n")
    Path("r.txt").write_text("A serves food.\nA has food.\n\nB is cheap.\n")
    files = ["--predictions", "p.txt", "--references", "r.txt"]
    done = swlora("score", *files, "--json", "s.json", "--output", "run")
    assert done.code == 0
    assert "BLEU         100.0  100.0 to 100.0\n" in done.out
    result = json.loads(Path("s.json").read_text())
    assert (result["BLEU"], result["ROUGE_L"], result["n_prompts"]) == (1, 1, 2)
    assert json.loads(Path("run/result.json").read_text()) == result
    Path("used").mkdir()
    Path("used/result.json").write_text('{"mine": 1}')
    assert swlora("score", *files, "--output", "used").code == 0
    assert json.loads(Path("used/result.json").read_text()) == {"mine": 1, **result}
    Path("p.txt").write_text("A serves food.\n")
    assert "has 1 output but r.txt has 2 distinct MRs" in swlora("score", *files).mistake
    assert "cannot read gone" in swlora("score", *files[:3], "gone").mistake


@pytest.mark.parametrize("verb", RUN_VERBS)
def test_an_existing_run_is_refused(verb, swlora, small):
    swlora("train", *small, "--output", "run")
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    mistake = swlora(verb, "--output", "run").mistake
    assert mistake == "run already holds a run (done); choose another --output"
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before


def test_the_module_and_the_command_are_the_same():
    command = Path(sys.executable).with_name("swlora")
    if not command.exists():
        pytest.skip("the package is not installed as a command")
    environment = {**os.environ, "COLUMNS": "80"}
    outputs = [
        subprocess.run([*start, "--help"], capture_output=True, text=True, env=environment).stdout
        for start in ([str(command)], [sys.executable, "-m", "swlora"])
    ]
    assert outputs[0] == outputs[1] != ""
