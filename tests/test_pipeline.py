"""The whole job on tiny models: what comes out is what plain PEFT and obvious loops say."""

import csv
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from swlora import pipeline
from swlora.config import RunSpec, load_spec
from swlora.data import scratch
from swlora.errors import DataError, RunFailedError, UserError
from swlora.evaluation import english
from swlora.evaluation import scores as official
from swlora.evaluation.english import english_loss
from swlora.evaluation.prompting import Prompt, generate_text
from swlora.evaluation.segments import Segments
from swlora.job import Job
from swlora.models.anatomy import Anatomy
from swlora.progress import Silent
from swlora.runs import Run, read_metrics, read_run
from swlora.superweights import ablate, proof

EOS = 257
TRAIN = [
    {"prompt": f"name[{name}], food[{food}]\n", "completion": f"{name} {verb} {food}."}
    for name, food in (("A", "x"), ("Bo", "yy"), ("Cem", "z"), ("Dora", "xx"))
    for verb in ("has", "serves", "is the place for")
]
DEV = [
    {"prompt": "name[E], food[x]\n", "completion": "E has x."},
    {"prompt": "name[Fritz], food[yy]\n", "completion": "Fritz serves yy."},
    {"prompt": "name[E], food[x]\n", "completion": "E serves x."},
]


@pytest.fixture(autouse=True)
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Java takes ten seconds to say what tests of the metrics say anyway."""
    monkeypatch.setattr(official, "missing_java", lambda: "Java is left out here")


@pytest.fixture
def rows(tmp_path) -> tuple[Path, Path]:
    return write_rows(tmp_path / "train.jsonl", TRAIN), write_rows(tmp_path / "dev.jsonl", DEV)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_spec(model: Path, data: tuple[Path, Path], **changes: Any) -> RunSpec:
    """Three epochs of four steps, a prompt's rows each; `changes` as in adapter__rank=2."""
    settings = {
        "model.name": str(model),
        "model.dtype": "float32",
        "model.device": "cpu",
        "data.name": str(data[0]),
        "data.eval_file": str(data[1]),
        "adapter.rank": 3,
        "train.epochs": 3,
        "train.batch_size": 3,
        "train.learning_rate": 0.02,
        "decode.max_new_tokens": 9,
        "identify.windows": 1,
        "identify.window_tokens": 32,
    }
    return load_spec(None, settings | {k.replace("__", "."): v for k, v in changes.items()})


def run_in(folder: Path, spec: RunSpec, command: str = "train-eval", progress: Any = None) -> Any:
    with Run.create(folder, spec, command) as run:
        return work(Job(spec, run, progress or Silent()))


def resume(folder: Path) -> Any:
    run, spec = Run.reopen(folder, read_run(folder)["command"])
    with run:
        return work(Job(spec, run, Silent()))


def work(job: Job) -> Any:
    command = job.run.facts["command"]
    if command == "train":
        return pipeline.train(job)[1]
    return {"train-eval": pipeline.train_evaluate, "identify": pipeline.identify}[command](job)


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same_adapters(one: Path, other: Path) -> bool:
    a, b = adapter_weights(one), adapter_weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("layers", ["all", "last:1"])
def test_data_in_files_gives_the_same_adapter_and_loss(
    model_folder, rows, tmp_path, monkeypatch, layers
) -> None:
    monkeypatch.setenv("SWLORA_CACHE", str(tmp_path / "cache"))
    spec = make_spec(model_folder("llama"), rows, adapter__layers=layers)
    held = run_in(tmp_path / "held", spec)
    monkeypatch.setattr(scratch, "MEMORY_BYTES", 0)
    for command in ("first", "second"):  # the second reads the cache of states of the first two
        stored = run_in(tmp_path / command, spec)
        assert same_adapters(tmp_path / "held", tmp_path / command)
        assert stored["eval"]["nll_sum_nats"] == held["eval"]["nll_sum_nats"]


def naive_nll(model, rows: list[dict[str, str]]) -> float:
    total, n_tokens = 0.0, 0
    for row in rows:
        prompt, completion = list(row["prompt"].encode()), [*row["completion"].encode(), EOS]
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
        log_p = torch.log_softmax(logits[len(prompt) - 1 : -1].double(), dim=-1)
        total -= float(log_p[torch.arange(len(completion)), completion].sum())
        n_tokens += len(completion)
    return total / n_tokens


def naive_text(model, tokenizer, prompt: str, n: int = 9) -> str:
    ids = list(prompt.encode())
    for _ in range(n):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    text = tokenizer.decode(ids[len(prompt.encode()) :], skip_special_tokens=True)
    return " ".join(text.split())


# Train and evaluate


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
    weights = adapter_weights(folder)
    assert trained["n_trainable"] == sum(tensor.numel() for tensor in weights.values())
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
    assert header == ["prompt", "prediction", "ref_1", "ref_2"]
    prompts = ["name[E], food[x]\n", "name[Fritz], food[yy]\n"]
    references = [["E has x.", "E serves x."], ["Fritz serves yy.", ""]]
    assert predictions == [
        [prompt, naive_text(model, tiny_tokenizer, prompt), *refs]
        for prompt, refs in zip(prompts, references, strict=True)
    ]


def test_the_run_folder_explains_itself(model_folder, rows, tmp_path):
    spec = make_spec(model_folder("llama"), rows, seed=7)
    folder = tmp_path / "run"
    result = run_in(folder, spec)
    assert {path.name for path in folder.iterdir()} == {
        "adapter",
        "config.yaml",
        "loss.png",
        "metrics.jsonl",
        "predictions.csv",
        "result.json",
        "run.json",
        "segments.json",
    }
    assert load_spec(folder / "config.yaml", {}) == spec
    assert json.loads((folder / "result.json").read_text()) == result
    facts = read_run(folder)
    assert (facts["status"], facts["command"], facts["seed"]) == ("done", "train-eval", 7)
    assert facts["model_source"] == f"the folder {model_folder('llama')}"
    assert facts["data_source"] == f"rows of {rows[0]}, evaluated on {rows[1]}"
    assert len(facts["data_sha256"]) == 64
    assert facts["n_skipped_rows"] == 0
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
        _, (shown, _, reference) = csv.reader(file)
    assert (shown, reference) == ("system: Be brief.\nuser: x?", "Yes.")
    assert result["eval"]["n_tokens"] == 5
    noted = json.loads((tmp_path / "run" / "adapter" / "swlora.json").read_text())
    assert noted["is_chat"] is True
    model = peft.PeftModel.from_pretrained(make_model("llama"), str(tmp_path / "run" / "adapter"))
    prompt, completion = (
        [256, *b"system:Be brief.;", 256, *b"user:x?;", 256, *b"assistant:"],
        [*b"Yes.", EOS],
    )
    log_p = model.eval()(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    expected = -sum(float(log_p[len(prompt) - 1 + k, token]) for k, token in enumerate(completion))
    assert result["eval"]["nll_sum_nats"] == pytest.approx(expected, rel=1e-4)


def test_rows_that_are_left_out_or_cut_are_counted(model_folder, rows, tmp_path):
    long = {"prompt": "p", "completion": "y" * 300}
    bad = {"prompt": "", "completion": "y"}
    data = write_rows(tmp_path / "more.jsonl", [*TRAIN, bad, long]), rows[1]
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
        ({"adapter__layers": "3"}, "layer 3 does not exist"),
        ({"adapter__targets": "nope"}, "no projection is called 'nope'"),
    ],
)
def test_what_cannot_end_well_does_not_start(changes, said, model_folder, rows, tmp_path):
    with pytest.raises(UserError, match=said):
        run_in(tmp_path / "run", make_spec(model_folder("gpt2"), rows, **changes))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "run.json"}
    assert read_run(tmp_path / "run")["status"] == "failed"


# Stop and resume


class StopsIn(Silent):
    """A person who presses Ctrl-C in the n-th advance of a task."""

    def __init__(self, task: str, n: int) -> None:
        self.name, self.n = task, n
        self.running = ""

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Any]:  # noqa: ARG002
        self.running, before = description, self.running
        yield self
        self.running = before

    def advance(self, amount: float = 1.0, note: str = "") -> None:  # noqa: ARG002
        if self.running == self.name:
            self.n -= 1
            if self.n == 0:
                raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("engine", "task", "n", "n_steps"),
    [
        ("tree", "train", 2, 1),
        ("tree", "train", 6, 5),
        ("plain", "train", 6, 5),
        ("tree", "generate", 1, 12),
    ],
)
def test_a_resumed_run_gives_the_same_adapter(
    task, n, n_steps, engine, model_folder, rows, tmp_path
):
    """Stopped before the first checkpoint, in training, or after it; with dropout, which is random.

    (The first advance of the bar is one of no steps.)
    """
    changes = {"adapter__dropout": 0.3, "train__checkpoint_every_s": 1e-9, "train__engine": engine}
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
    assert not (folder / "checkpoint").exists()
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, 13))


def test_a_run_does_not_go_on_with_other_data(model_folder, rows, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_in(folder, make_spec(model_folder("llama"), rows), progress=StopsIn("train", 3))
    write_rows(rows[0], [*TRAIN[1:], TRAIN[0]])
    with pytest.raises(UserError, match="cannot go on: data_sha256 was"):
        resume(folder)
    write_rows(rows[0], TRAIN)
    assert resume(folder)["train"]["steps"] == 12


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


# Evaluate and generate


def test_an_adapter_is_evaluated_from_its_folder_or_its_run(model_folder, rows, tmp_path):
    spec = make_spec(model_folder("llama"), rows)
    expected = run_in(tmp_path / "run", spec)["eval"]
    results = {}
    for name, adapter in (
        ("run", tmp_path / "run"),
        ("folder", tmp_path / "run" / "adapter"),
        ("base", None),
    ):
        with Run.create(tmp_path / f"eval-{name}", spec, "eval") as run:
            results[name] = pipeline.evaluate_adapter(Job(spec, run, Silent()), adapter)
        assert run.facts.get("adapter") == (None if adapter is None else str(adapter))
    scores = ("BLEU", "NIST", "ROUGE_L", "CIDEr", "n_tokens")
    for name in ("run", "folder"):
        assert [results[name][key] for key in scores] == [expected[key] for key in scores]
        assert results[name]["nll"] == pytest.approx(expected["nll"], rel=1e-5)
    assert results["base"]["nll"] > expected["nll"]


def test_english_text_is_measured_with_e2e_data_or_where_it_is_asked_for(
    model_folder, rows, tmp_path, monkeypatch
):
    """The untouched model once, however many evaluations; without an adapter nothing else."""
    monkeypatch.setenv("SWLORA_CACHE", str(tmp_path / "cache"))
    measured, measure = [], english._measured
    monkeypatch.setattr(english, "_measured", lambda *a: measured.append(a) or measure(*a))
    sample: dict[str, Any] = {"name": "sample", "eval_file": None, "truncate": True}
    sample |= {"train_rows": 3, "eval_prompts": 1}

    def evaluated(name: str, asked: bool | None, *, own: bool, command: str = "eval") -> Any:
        spec = make_spec(model_folder("llama"), rows, train__max_steps=1, data__english=asked)
        if not own:
            data = spec.data.model_copy(update=sample)
            spec = spec.model_copy(update={"data": data})
        with Run.create(tmp_path / name, spec, command) as run:
            job = Job(spec, run, Silent())
            if command == "eval":
                return pipeline.evaluate_adapter(job, None)
            return pipeline.train_evaluate(job)["eval"]

    assert "english_perplexity" not in evaluated("own", None, own=True)
    assert "english_perplexity" not in evaluated("sample-without", False, own=False)
    assert measured == []
    for name, asked, own in (("asked", True, True), ("sample", None, False)):
        result = evaluated(name, asked, own=own)
        assert result["english_perplexity"] == result["english_perplexity_before"]
        assert len(measured) == 1
    result = evaluated("trained", None, own=False, command="train-eval")
    assert result["english_perplexity"] != result["english_perplexity_before"]
    assert len(measured) == 2


def test_generated_text_sees_the_prompt_as_in_training(
    model_folder, make_model, tiny_tokenizer, rows, tmp_path
):
    """E2E data separates prompt and text by a newline, which the user does not type."""
    spec = make_spec(model_folder("llama"), rows)
    run_in(tmp_path / "run", spec)
    facts = tmp_path / "run" / "adapter" / "swlora.json"
    model = peft.PeftModel.from_pretrained(make_model("llama"), str(facts.parent)).eval()
    texts = []
    for separator in ("", "\n> "):
        facts.write_text(json.dumps({"separator": separator}))
        result = generate_text(spec, Prompt("name[E]"), tmp_path / "run", Silent())
        texts.append(" ".join(result["text"].split()))
        assert texts[-1] == naive_text(model, tiny_tokenizer, "name[E]" + separator)
    assert texts[0] != texts[1]
    base = generate_text(spec, Prompt("name[E]"), None, Silent())["text"]
    assert " ".join(base.split()) == naive_text(make_model("llama"), tiny_tokenizer, "name[E]")


# Identify


@pytest.fixture
def layer_1_matters(monkeypatch) -> None:
    """Proofs that say: the candidates of layer 1 are super weights, all others are none."""
    prove = proof.prove

    def judged(*args: Any, **settings: Any) -> proof.Proof:
        found = prove(*args, **settings)
        verdicts = ("super" if of.address.layer == 1 else "none" for of in found.addresses)
        alone = zip(found.addresses, verdicts, strict=True)
        addresses = tuple(replace(of, verdict=verdict) for of, verdict in alone)
        return replace(found, addresses=addresses, joint_proven=found.joint)

    monkeypatch.setattr(proof, "prove", judged)


def test_identify(model_folder, make_model, tiny_tokenizer, rows, tmp_path):
    """Ratios are those of models with one weight less, measured one by one."""
    spec = make_spec(model_folder("gpt2"), rows, identify__max_candidates=4)
    result = run_in(tmp_path / "run", spec, "identify")
    windows = ablate.text_windows(tiny_tokenizer, None, 1, 32)
    intact = ablate.text_loss(make_model("gpt2"), windows).perplexity
    assert result["perplexity"] == pytest.approx(intact, rel=1e-5)
    assert len(result["candidates"]) == 4
    for c in result["candidates"]:
        model = make_model("gpt2")
        weight = Anatomy(model).projection(c["layer"], c["module"]).weight
        assert c["weight"] == weight[c["in_channel"], c["out_channel"]]
        weight[c["in_channel"], c["out_channel"]] = 0
        ablated = ablate.text_loss(model, windows).perplexity
        assert c["perplexity"] == pytest.approx(ablated, rel=1e-5)
        assert c["ratio"] == pytest.approx(ablated / intact, rel=1e-5)
    assert len(result["modules"]) == 12
    folder = tmp_path / "run"
    assert json.loads((folder / "result.json").read_text()) == {"identify": result}
    assert set(result["figures"].values()) == {
        str(folder / f"superweights{part}.png") for part in ("", "-path", "-dose")
    }
    for path in result["figures"].values():
        assert Path(path).read_bytes().startswith(b"\x89PNG")
    assert result["report"] == str(folder / "superweights.md")
    assert (folder / "superweights.md").read_text().startswith("# Super weights of ")


@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG"), ("b.svg", b"<?xml"), ("c.PDF", b"%PDF")]
)
def test_figures_of_every_format(name, start, model_folder, rows, tmp_path):
    spec = make_spec(model_folder("llama"), rows)
    with Run.create(tmp_path / "run", spec, "identify") as run:
        pipeline.identify(Job(spec, run, Silent()), tmp_path / "new" / name)
    assert (tmp_path / "new" / name).read_bytes().startswith(start)


def test_identify_refuses_before_it_works(model_folder, rows, tmp_path):
    spec = make_spec(model_folder("gpt2"), rows, identify__window_tokens=257)
    with pytest.raises(UserError, match="--window-tokens 257 exceeds the model's context of 256"):
        run_in(tmp_path / "a", spec, "identify")
    spec = make_spec(tmp_path / "not-even-looked-for", rows)
    with (
        Run.create(tmp_path / "b", spec, "identify") as run,
        pytest.raises(UserError, match="must end in"),
    ):
        pipeline.identify(Job(spec, run, Silent()), tmp_path / "a.xyz")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_super_trains_the_layers_that_were_verified(
    dtype, layer_1_matters, model_folder, rows, tmp_path
):
    """Exactly as if they had been listed: identification leaves no trace in the model."""
    changes = {"model__dtype": dtype, "train__epochs": 1}
    folder = model_folder("llama")
    found = run_in(tmp_path / "super", make_spec(folder, rows, adapter__layers="super", **changes))
    listed = run_in(tmp_path / "listed", make_spec(folder, rows, adapter__layers="1", **changes))
    assert found["train"]["layers"] == [1]
    assert same_adapters(tmp_path / "super", tmp_path / "listed")
    assert found["eval"]["nll"] == listed["eval"]["nll"]
    saved = json.loads((tmp_path / "super" / "result.json").read_text())
    assert saved["identify"]["layers"] == [1]
    assert {c["verdict"] for c in saved["identify"]["candidates"]} == {"super", "none"}
    assert {"superweights.md", "superweights.png"} <= {
        path.name for path in (tmp_path / "super").iterdir()
    }


def test_super_without_a_super_weight_says_so(model_folder, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "verdict", lambda *_: "none")
    spec = make_spec(model_folder("llama"), rows, adapter__layers="super")
    with pytest.raises(UserError, match="no super weight was verified"):
        run_in(tmp_path / "run", spec)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["identify"]["layers"] == []


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
            "data.train_rows": 240,
            "data.eval_prompts": 12,
            "adapter.layers": "last:2",
            "adapter.rank": 8,
            "train.batch_size": 8,
            "train.learning_rate": 4e-3,
        },
    )
    with Run.create(tmp_path / "run", spec, "train") as run:
        job = Job(spec, run, Silent())
        dev = job.encoded("dev")
        before = dataset_loss(job.loaded.model, dev, Silent())
        model, result = pipeline.train(job)
        after = dataset_loss(model.eval(), dev, Silent())
    assert result["steps"] == 30
    assert before.n_tokens == after.n_tokens
    assert after.nats_per_token < before.nats_per_token - 0.5
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert sum(losses[-5:]) < sum(losses[:5])
