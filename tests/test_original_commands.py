"""The commands of the original README: every flag arrives, and the real thing runs."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import swlora.cli.app
import swlora.pipeline
from swlora.config import RunSpec, load_spec
from swlora.job import Job

ROOT = Path(__file__).resolve().parents[1]
Main = Callable[[list[str]], None]


def _script(folder: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{folder}_main", ROOT / folder / "main.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Recorder:
    """Stands in for the pipeline: remembers what each verb was asked to do."""

    def __init__(self) -> None:
        self.verb = ""
        self.spec = RunSpec()
        self.folder = Path()
        self.adapter: Path | None = None

    def _note(self, verb: str, job: Job) -> None:
        self.verb, self.spec, self.folder = verb, job.spec, job.run.folder

    def train(self, job: Job) -> dict[str, object]:
        self._note("train", job)
        return {"steps": 1}

    def train_evaluate(
        self, job: Job, metric: object
    ) -> tuple[dict[str, object], dict[str, object]]:
        assert metric is None
        self._note("train_eval", job)
        return {"steps": 1}, {"BLEU": 0.5}

    def evaluate_adapter(self, job: Job, adapter: Path | None, metric: object) -> dict[str, object]:
        assert metric is None
        self._note("eval", job)
        self.adapter = adapter
        return {"BLEU": 0.5}

    def identify(self, job: Job, figure: Path | None, adapter: Path | None) -> dict[str, object]:
        assert adapter is None
        self._note("identify", job)
        return {"figure": str(figure)}


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recorder:
    recorder = Recorder()
    for name in ("train", "train_evaluate", "evaluate_adapter", "identify"):
        monkeypatch.setattr(swlora.pipeline, name, getattr(recorder, name))
    for name in ("show_candidates", "show_training", "show_evaluation"):
        monkeypatch.setattr(swlora.cli.app, name, lambda _: None)
    monkeypatch.chdir(tmp_path)
    return recorder


@pytest.fixture
def train_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Main:
    """The pipeline command, with its default adapter folder moved out of the checkout."""
    module = _script("train_eval_pipeline")
    monkeypatch.setattr(module, "PEFT_FOLDER", tmp_path / "peft_model")
    return module.main


@pytest.mark.parametrize("mode", ["train", "train_eval"])
def test_defaults_are_the_original_ones(
    recorder: Recorder, train_eval: Main, tmp_path: Path, mode: str
) -> None:
    train_eval(["--mode", mode])
    assert recorder.verb == mode
    assert recorder.folder == tmp_path / "peft_model"
    spec = recorder.spec
    assert (spec.model.name, spec.model.tokenizer) == ("openai-community/gpt2", None)
    assert spec.data.name == "tuetschek/e2e_nlg"
    assert (spec.adapter.rank, spec.adapter.alpha, spec.adapter.dropout) == (4, 32.0, 0.1)
    assert (spec.adapter.targets, str(spec.adapter.layers)) == (["all-linear"], "all")
    if mode == "train_eval":
        assert spec.decode.batch_size == 8


@pytest.mark.parametrize("mode", ["train", "train_eval"])
def test_every_training_flag_reaches_its_field(
    recorder: Recorder, train_eval: Main, tmp_path: Path, mode: str
) -> None:
    train_eval(
        f"--mode {mode} --path_to_model some/model --path_to_tokenizer some/tokenizer "
        f"--path_to_peft_model {tmp_path}/mine --path_to_dataset rows.jsonl --lora_rank 3 "
        "--lora_alpha 7 --lora_dropout 0.25 --lora_target_modules c_attn,c_fc "
        "--lora_layers_to_transform 2,11 --validation_batch_size 5".split()
    )
    spec = recorder.spec
    assert recorder.folder == tmp_path / "mine"
    assert (spec.model.name, spec.model.tokenizer) == ("some/model", "some/tokenizer")
    assert spec.data.name == "rows.jsonl"
    assert (spec.adapter.rank, spec.adapter.alpha, spec.adapter.dropout) == (3, 7.0, 0.25)
    assert (spec.adapter.targets, str(spec.adapter.layers)) == (["c_attn", "c_fc"], "2,11")
    if mode == "train_eval":
        assert spec.decode.batch_size == 5


def test_eval_flags_reach_their_fields(
    recorder: Recorder, train_eval: Main, tmp_path: Path
) -> None:
    train_eval(
        f"--mode eval --path_to_model some/model --path_to_tokenizer some/tokenizer "
        f"--path_to_peft_model {tmp_path}/mine --path_to_dataset rows.jsonl "
        "--validation_batch_size 5".split()
    )
    spec = recorder.spec
    assert (recorder.verb, recorder.adapter) == ("eval", tmp_path / "mine")
    assert (spec.model.name, spec.model.tokenizer) == ("some/model", "some/tokenizer")
    assert (spec.data.name, spec.decode.batch_size) == ("rows.jsonl", 5)


def test_eval_loads_what_train_saved_by_default(
    recorder: Recorder, train_eval: Main, tmp_path: Path
) -> None:
    train_eval(["--mode", "eval"])
    assert recorder.adapter == tmp_path / "peft_model"
    assert recorder.spec.decode.batch_size == 8


@pytest.mark.parametrize(
    "values",
    [
        "--lora_layers_to_transform 2,11",
        "--lora_layers_to_transform 2, 11",
        "--lora_layers_to_transform 2 11",
        "--lora_layers_to_transform 2 --lora_layers_to_transform 11",
        "--lora_layers_to_transform=2 --lora_layers_to_transform=11",
    ],
)
def test_lists_may_be_written_in_every_way(
    recorder: Recorder, train_eval: Main, values: str
) -> None:
    targets = values.replace("lora_layers_to_transform", "lora_target_modules")
    targets = targets.replace("11", "c_fc").replace("2", "attn.c_proj")
    train_eval(["--mode", "train", *values.split(), *targets.split()])
    assert str(recorder.spec.adapter.layers) == "2,11"
    assert recorder.spec.adapter.targets == ["attn.c_proj", "c_fc"]


def test_what_was_not_named_may_be_replaced_and_what_was_may_not(
    recorder: Recorder, train_eval: Main
) -> None:
    """The defaults here and there are the same, so only what was written arrives as written."""
    named = ["--path_to_model", "openai-community/gpt2"]
    identify = _script("super_weights_identification").main
    for mode in ("train", "eval", "train_eval"):
        train_eval(["--mode", mode, "--path_to_peft_model", f"{mode}-1"])
        assert (
            "name" not in recorder.spec.model.model_fields_set | recorder.spec.data.model_fields_set
        )
        dataset = ["--path_to_dataset", "tuetschek/e2e_nlg"]
        train_eval(["--mode", mode, "--path_to_peft_model", f"{mode}-2", *named, *dataset])
        assert "name" in recorder.spec.model.model_fields_set & recorder.spec.data.model_fields_set
    identify([])
    assert "name" not in recorder.spec.model.model_fields_set
    identify(named)
    assert "name" in recorder.spec.model.model_fields_set


def test_a_tokenizer_that_is_the_models_own_is_not_named_twice(
    recorder: Recorder, train_eval: Main
) -> None:
    same = ["--path_to_model", "openai-community/gpt2"]
    same += ["--path_to_tokenizer", "openai-community/gpt2"]
    train_eval(["--mode", "train", *same])
    assert recorder.spec.model.tokenizer is None
    _script("super_weights_identification").main(same)
    assert recorder.spec.model.tokenizer is None


def test_new_flags_are_handed_on(recorder: Recorder, train_eval: Main) -> None:
    train_eval(
        ["--mode", "train", "--lora_layers_to_transform", "2", "--train-rows", "70", "--seed", "3"]
    )
    assert (recorder.spec.data.train_rows, recorder.spec.seed) == (70, 3)


def test_identification_flags_reach_their_fields(recorder: Recorder) -> None:
    main = _script("super_weights_identification").main
    main(["--path_to_model", "some/model", "--path_to_tokenizer", "some/tokenizer"])
    assert recorder.verb == "identify"
    assert recorder.spec.model.name == "some/model"
    assert recorder.spec.model.tokenizer == "some/tokenizer"
    main([])
    assert recorder.spec.model.name == "openai-community/gpt2"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--mode finetune", "finetune"),
        ("", "--mode"),
        ("--mode train --lora_rank four", "--lora_rank"),
        ("--mode train --lora_rank 0", "--rank: must be"),
        ("--mode train --lora_rnak 4", "--lora_rnak"),
        ("--mode train --lora_layers_to_transform", "--lora_layers_to_transform"),
        ("--mode train --lora_dropout 1.5", "--dropout: must be"),
    ],
)
def test_mistakes_are_named_and_end_with_code_2(
    recorder: Recorder,
    train_eval: Main,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    said: str,
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train_eval(arguments.split())
    assert stopped.value.code == 2
    assert recorder.verb == ""
    assert said in capsys.readouterr().err


def test_a_flag_without_use_in_a_mode_is_said(
    recorder: Recorder, train_eval: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    train_eval(["--mode", "eval", "--lora_rank", "8"])
    assert "--lora_rank" in capsys.readouterr().err
    train_eval(["--mode", "train", "--validation_batch_size", "16"])
    assert "--validation_batch_size" in capsys.readouterr().err


# The real thing


def _run(folder: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m module` in the folder, with no Java on PATH, which would take ten seconds."""
    path = [d for d in os.environ["PATH"].split(os.pathsep) if not (Path(d) / "java").exists()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = os.pathsep.join(path)
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_web_page_is_served_with_the_flags_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a flag too: everything has a default."""
    called: list[list[str]] = []
    monkeypatch.setattr(swlora.cli, "main", called.append)
    main = _script("web_site").main
    main([])
    main(["--port", "8001"])
    assert called == [["serve"], ["serve", "--port", "8001"]]


def _save_tiny_gpt2(folder: Path, texts: list[str]) -> None:
    """Save a GPT-2 of 3 blocks, width 24, and a byte-level tokenizer made from `texts`."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=300, special_tokens=["<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=256,
        n_embd=24,
        n_layer=3,
        n_head=3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)


def _save_e2e_folder(folder: Path) -> list[str]:
    """Write an E2E folder: 10 training rows, 3 and 2 MRs of two references; return its texts."""
    folder.mkdir()
    texts = []
    for name, n_mrs in (("trainset", 5), ("devset", 3), ("testset_w_refs", 2)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["mr", "ref"])
            for k in range(n_mrs):
                mr = f"name[{name} {k}], food[Thai]"
                refs = [f"{name} {k} serves Thai food.", f"Thai food is served at {name} {k}."]
                writer.writerows([mr, ref] for ref in refs)
                texts += [mr, *refs]
    return texts


def test_train_eval_then_eval_really_run_from_inside_the_folder(tmp_path: Path) -> None:
    texts = _save_e2e_folder(tmp_path / "e2e")
    _save_tiny_gpt2(tmp_path / "model", texts)
    saved = tmp_path / "peft"
    common = ["--path_to_model", str(tmp_path / "model"), "--path_to_dataset"]
    common += [str(tmp_path / "e2e"), "--path_to_peft_model", str(saved)]
    common += ["--validation_batch_size", "2", "--max-new-tokens", "7"]
    lora = ["--lora_rank", "2", "--lora_layers_to_transform", "0,2"]
    folder = ROOT / "train_eval_pipeline"

    done = _run(folder, "main", "--mode", "train_eval", *common, *lora)
    assert done.returncode == 0, done.stderr
    config = json.loads((saved / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 32, 0.1)
    assert config["layers_to_transform"] == [0, 2]
    assert load_spec(saved / "config.yaml", {}).decode.batch_size == 2
    trained = json.loads((saved / "result.json").read_text())
    assert trained["train"]["rows"] == 10
    assert trained["eval"]["n_prompts"] == 3

    again = tmp_path / "again.json"
    output = ["--json", str(again), "--output", str(tmp_path / "eval")]
    done = _run(folder, "main", "--mode", "eval", *common, *output)
    assert done.returncode == 0, done.stderr
    evaluated = json.loads(again.read_text())
    for score in ("BLEU", "NIST", "ROUGE_L", "CIDEr"):
        assert evaluated[score] == trained["eval"][score]
    # The saved weights are the trained ones to the last bit; sums may differ in the last place.
    assert evaluated["nll"] == pytest.approx(trained["eval"]["nll"], rel=1e-6)
