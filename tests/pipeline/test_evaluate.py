"""Adapters evaluated and used from their folders, beside the untouched model."""

import json
from typing import Any

import peft
import pytest
from tests.support.whole_jobs import make_spec, naive_text, run_in

from swlora import pipeline
from swlora.evaluation import english
from swlora.evaluation.prompting import Prompt, generate_text
from swlora.job import Job
from swlora.progress import Silent
from swlora.result_json import as_json
from swlora.runs import Run, read_run

pytestmark = pytest.mark.usefixtures("no_drawings")


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
            found = pipeline.evaluate_adapter(Job(spec, run, Silent()), adapter)
            results[name] = as_json(found)
        assert run.facts.get("adapter") == (None if adapter is None else str(adapter))
    scores = ("BLEU", "NIST", "ROUGE_L", "CIDEr", "n_tokens")
    for name in ("run", "folder"):
        assert [results[name][key] for key in scores] == [expected[key] for key in scores]
        assert results[name]["nll"] == pytest.approx(expected["nll"], rel=1e-5)
    assert results["base"]["nll"] > expected["nll"]


def test_english_text_is_measured_with_e2e_data_or_where_it_is_asked_for(
    model_folder, rows, tmp_path, monkeypatch, fresh_cache
):
    """The untouched model once, however many evaluations; without an adapter nothing else."""
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
                return as_json(pipeline.evaluate_adapter(job, None))
            return as_json(pipeline.train_evaluate(job)[1])

    assert "english_perplexity" not in evaluated("own", None, own=True)
    assert "english_perplexity" not in evaluated("sample-without", False, own=False)
    assert measured == []
    for name, asked, own in (("asked", True, True), ("sample", None, False)):
        result = evaluated(name, asked, own=own)
        assert result["english_perplexity"] == result["english_perplexity_before"]
        assert len(measured) == 1
        assert read_run(tmp_path / name)["is_sample"] is not own
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
        texts.append(" ".join(result.text.split()))
        assert texts[-1] == naive_text(model, tiny_tokenizer, "name[E]" + separator)
    assert texts[0] != texts[1]
    base = generate_text(spec, Prompt("name[E]"), None, Silent()).text
    assert " ".join(base.split()) == naive_text(make_model("llama"), tiny_tokenizer, "name[E]")
