"""The whole job on tiny models: what comes out is what plain PEFT and obvious loops say."""

import csv
import json
import math

import peft
import pytest
import torch
from tests.support.data_files import write_rows
from tests.support.small_runs import ROWS, weights
from tests.support.whole_jobs import (
    DEV,
    make_spec,
    naive_nll,
    naive_text,
    run_in,
    same_adapters,
)

from swlora import pipeline
from swlora.config import load_spec
from swlora.data import scratch
from swlora.errors import DataError, UserError
from swlora.evaluation.english import english_loss
from swlora.evaluation.segments import Segments
from swlora.job import Job
from swlora.metrics_file import read_metrics
from swlora.progress import Silent
from swlora.runs import Run, read_run


@pytest.mark.parametrize("layers", ["all", "last:1"])
def test_data_in_files_gives_the_same_adapter_and_loss(
    model_folder, rows, tmp_path, monkeypatch, fresh_cache, layers
) -> None:
    spec = make_spec(model_folder("llama"), rows, adapter__layers=layers)
    held = run_in(tmp_path / "held", spec)
    monkeypatch.setattr(scratch, "MEMORY_BYTES", 0)
    for command in ("first", "second"):  # the second reads the cache of states of the first two
        stored = run_in(tmp_path / command, spec)
        assert same_adapters(tmp_path / "held", tmp_path / command)
        assert stored["eval"]["nll_sum_nats"] == held["eval"]["nll_sum_nats"]


@pytest.mark.parametrize(
    ("model_type", "engine"),
    [("llama", "tree"), ("llama", "plain"), ("gpt2", "auto"), ("falcon", "auto")],
)
def test_the_whole_job(
    model_type, engine, model_folder, make_model, tiny_tokenizer, rows, tmp_path
):
    """What is reported is what plain PEFT measures with the adapter that was saved."""
    settings = {"adapter__layers": "0,2", "train__engine": engine, "data__english": True}
    spec = make_spec(model_folder(model_type), rows, **settings)
    folder = tmp_path / "run"
    result = run_in(folder, spec)
    model = make_model(model_type)
    untrained, untouched = naive_nll(model, DEV), english_loss(model, tiny_tokenizer)
    model = peft.PeftModel.from_pretrained(model, str(folder / "adapter")).eval()

    trained = result["train"]
    assert (trained["layers"], trained["rows"], trained["steps"]) == ([0, 2], 36, 12)
    saved = weights(folder / "adapter")
    assert trained["n_trainable"] == sum(tensor.numel() for tensor in saved.values())
    lines = read_metrics(folder)
    assert trained["last_loss"] == lines[-1]["loss"] < lines[0]["loss"]

    evaluated = result["eval"]
    assert evaluated["nll"] == pytest.approx(naive_nll(model, DEV), rel=1e-4)
    assert evaluated["nll"] < untrained
    assert evaluated["n_tokens"] == sum(len(row["completion"]) + 1 for row in DEV)
    assert evaluated["nll_sum_nats"] == pytest.approx(evaluated["nll"] * evaluated["n_tokens"])
    assert (evaluated["n_prompts"], evaluated["split"]) == (2, "dev")
    assert Segments.read(folder).sum_nats.tolist() == pytest.approx(
        [
            naive_nll(model, rows) * sum(len(r["completion"]) + 1 for r in rows)
            for rows in ([DEV[0], DEV[2]], [DEV[1]])
        ],
        rel=1e-4,
    )
    english = english_loss(model, tiny_tokenizer)
    assert evaluated["english_perplexity"] == pytest.approx(english.perplexity, rel=1e-4)
    assert evaluated["english_perplexity_before"] == pytest.approx(untouched.perplexity, rel=1e-6)
    assert evaluated["english_n_tokens"] == english.n_tokens
    assert evaluated["english_windows_begin_with_bos"] is False
    assert (evaluated["METEOR"], evaluated["meteor_reason"]) == (None, "Java is left out here")
    assert all(0 <= evaluated[name] <= 1 for name in ("BLEU", "ROUGE_L"))
    assert evaluated["intervals"] == Segments.read(folder).intervals()
    low, high = evaluated["intervals"]["NLL"]
    assert low <= evaluated["nll"] <= high

    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        header, *predictions = csv.reader(file)
    assert header[:4] == ["prompt", "prediction", "ref_1", "ref_2"]
    assert header[4:] == ["exact_match", "token_f1", "chrf", "rouge_l", "sum_nats", "n_tokens"]
    prompts = ["name[E], food[x]\n", "name[Fritz], food[yy]\n"]
    references = [["E has x.", "E serves x."], ["Fritz serves yy.", ""]]
    assert [row[:4] for row in predictions] == [
        [prompt, naive_text(model, tiny_tokenizer, prompt), *refs]
        for prompt, refs in zip(prompts, references, strict=True)
    ]


def test_the_run_folder_explains_itself(model_folder, rows, tmp_path):
    spec = make_spec(model_folder("llama"), rows, seed=7)
    folder = tmp_path / "run"
    result = run_in(folder, spec)
    assert {path.name for path in folder.iterdir()} == {
        "adapter",
        "checkpoint",  # from which more epochs go on
        "config.yaml",
        "loss.png",
        "metrics.jsonl",
        "predictions.csv",
        "predictions.jsonl",
        "result.json",
        "run.json",
        "segments.json",
    }
    assert load_spec(folder / "config.yaml", {}) == spec
    written = json.loads((folder / "result.json").read_text())
    assert written.pop("data")["train"]["n_rows"] == len(ROWS)
    assert written == result
    facts = read_run(folder)
    assert (facts["status"], facts["command"], facts["seed"]) == ("done", "train-eval", 7)
    assert facts["model_source"] == f"the folder {model_folder('llama')}"
    assert facts["data_source"] == f"rows of {rows[0]}, evaluated on {rows[1]}"
    assert len(facts["data_sha256"]) == 64
    assert (facts["n_skipped_rows"], facts["is_sample"]) == (0, False)
    timings = {"load_model", "load_data", "tokenise", "train", "loss", "generate"}
    assert set(facts["timings_s"]) == timings | {"attach", "prepare", "score", "total"}
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["rows"] for line in lines] == list(range(3, 37, 3))
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    noted = json.loads((folder / "adapter" / "swlora.json").read_text())
    chosen = {"layers": [0, 1, 2], "layer_policy": "all", "method": "lora", "is_chat": False}
    assert {key: noted[key] for key in chosen} == chosen
    assert noted["data"] == {"name": "train.jsonl", "rows": 12, "sha256": facts["data_sha256"]}
    assert noted["losses_nats_per_token"] == {
        "training, last step": lines[-1]["loss"],
        "held-out rows": lines[-1]["eval_nll"],
    }


def test_the_seed_decides(model_folder, rows, tmp_path):
    """Order of the data, initial values and dropout: all of it."""
    results = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(ord(name))  # what went before in the process does not count
        spec = make_spec(model_folder("llama"), rows, seed=seed, adapter__dropout=0.3)
        results[name] = run_in(tmp_path / name, spec)["eval"]["nll"]
    assert same_adapters(tmp_path / "a", tmp_path / "b")
    assert results["a"] == results["b"]
    assert not same_adapters(tmp_path / "a", tmp_path / "c")


def test_chats(model_folder, make_model, rows, tmp_path):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "x?"},
        {"role": "assistant", "content": "Yes."},
    ]
    others = [[{**turns[1], "content": f"{k}?"}, turns[2]] for k in range(5)]
    chats = [{"messages": m} for m in (*others, turns)]
    data = write_rows(tmp_path / "chats.jsonl", chats), write_rows(tmp_path / "d.jsonl", chats[-1:])
    result = run_in(tmp_path / "run", make_spec(model_folder("llama"), data))
    with (tmp_path / "run" / "predictions.csv").open(encoding="utf-8", newline="") as file:
        _, (shown, _, reference, *_) = csv.reader(file)
    assert (shown, reference) == ("system: Be brief.\nuser: x?", "Yes.")
    assert result["eval"]["n_tokens"] == 5
    noted = json.loads((tmp_path / "run" / "adapter" / "swlora.json").read_text())
    assert noted["is_chat"] is True
    model = peft.PeftModel.from_pretrained(make_model("llama"), str(tmp_path / "run" / "adapter"))
    prompt, completion = (
        [256, *b"system:Be brief.;", 256, *b"user:x?;", 256, *b"assistant:"],
        [*b"Yes.;"],  # as the template ends it
    )
    log_p = model.eval()(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    expected = -sum(float(log_p[len(prompt) - 1 + k, token]) for k, token in enumerate(completion))
    assert result["eval"]["nll_sum_nats"] == pytest.approx(expected, rel=1e-4)


def test_rows_that_are_left_out_or_cut_are_counted(model_folder, rows, tmp_path):
    long = {"prompt": "p", "completion": "y" * 300}
    bad = {"prompt": "", "completion": "y"}
    data = write_rows(tmp_path / "more.jsonl", [*ROWS, bad, long]), rows[1]
    folder = model_folder("llama")
    with pytest.raises(DataError, match="line 13: its prompt is empty"):
        run_in(tmp_path / "a", make_spec(folder, data))
    with pytest.raises(DataError, match=r"302 tokens, .* the model's context is 256"):
        run_in(tmp_path / "b", make_spec(folder, data, data__skip_bad_rows=True))
    spec = make_spec(folder, data, data__skip_bad_rows=True, data__truncate=True)
    assert run_in(tmp_path / "c", spec)["train"]["rows"] == 3 * 13
    facts = read_run(tmp_path / "c")
    assert (facts["n_skipped_rows"], facts["n_cut_rows_train"]) == (1, 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decode__max_new_tokens": 250}, "exceed the model's context"),
        ({"data__eval_file": None, "data__eval_split": "test"}, "has no test split"),
        ({"data__train_on": "last-turn"}, "--train-on last-turn: no row is a chat; leave it out"),
        ({"adapter__layers": "3"}, "layer 3 does not exist"),
        ({"adapter__targets": "nope"}, "no projection is called 'nope'"),
    ],
)
def test_what_cannot_end_well_does_not_start(changes, said, model_folder, rows, tmp_path):
    with pytest.raises(UserError, match=said):
        run_in(tmp_path / "run", make_spec(model_folder("gpt2"), rows, **changes))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "run.json"}
    assert read_run(tmp_path / "run")["status"] == "failed"


# The real thing


@pytest.mark.slow
def test_thirty_steps_on_real_data_teach_the_embedded_model(builtin_dir, shared_dir, tmp_path):
    from swlora.evaluation.loss import dataset_loss

    spec = load_spec(
        None,
        {
            "model.name": str(builtin_dir),
            "model.device": "cpu",
            "data.name": str(shared_dir / "e2e-dataset"),
            "data.train_rows": 120,
            "data.eval_prompts": 6,
            "adapter.layers": "last:2",
            "adapter.rank": 8,
            "train.epochs": 1,
            "train.batch_size": 4,
            "train.learning_rate": 4e-3,
        },
    )
    with Run.create(tmp_path / "run", spec, "train") as run:
        job = Job(spec, run, Silent())
        dev = job.encoded("dev").sequences
        before = dataset_loss(job.loaded.model, dev, Silent())
        trained = pipeline.train(job)
        after = dataset_loss(trained.model.eval(), dev, Silent())
    assert trained.course.steps == 30
    assert before.n_tokens == after.n_tokens
    assert after.nats_per_token < before.nats_per_token - 0.5
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert sum(losses[-5:]) < sum(losses[:5])
