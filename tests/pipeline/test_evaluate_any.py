"""Evaluation of data that are not E2E: every score, every file, and documents without a prompt."""

import json
from pathlib import Path

import pytest
from tests.support.whole_jobs import DEV, make_spec, run_in

from swlora import pipeline
from swlora.errors import UserError
from swlora.evaluation.segments import Segments
from swlora.evaluation.text_scores import text_rows
from swlora.evaluation.user_metrics import MetricError, UserMetric
from swlora.job import Job
from swlora.progress import Silent
from swlora.runs import Run

pytestmark = pytest.mark.usefixtures("no_drawings")


def evaluated(folder: Path, spec, metric=None):
    with Run.create(folder, spec, "eval") as run:
        return pipeline.evaluate_adapter(Job(spec, run, Silent()), None, metric)


def test_every_prompt_is_in_the_files(model_folder, rows, tmp_path) -> None:
    found = evaluated(tmp_path / "run", make_spec(model_folder("llama"), rows))
    lines = (tmp_path / "run/predictions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["prompt"] for record in records] == [DEV[0]["prompt"], DEV[1]["prompt"]]
    assert [len(record["references"]) for record in records] == [2, 1]
    assert sum(record["sum_nats"] for record in records) == pytest.approx(found.nll_sum_nats)
    assert sum(record["n_tokens"] for record in records) == found.n_tokens
    assert found.n_rows == 3 and found.nll_per_row == pytest.approx(found.nll_sum_nats / 3)
    texts = [record["prediction"] for record in records]
    alone = text_rows(texts, [record["references"] for record in records])
    assert [record["token_f1"] for record in records] == alone.token_f1.tolist()
    assert found.text_scores.token_f1 == pytest.approx(alone.token_f1.mean())
    result = json.loads((tmp_path / "run/result.json").read_text())["eval"]
    assert {"exact_match", "token_f1", "chrf", "sacrebleu", "sacrebleu_signature"} <= set(result)
    assert {"BLEU", "NIST", "nll", "nll_per_row"} <= set(result) and found.has_official


def test_the_official_five_are_shown_for_several_references(model_folder, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in DEV[:2]))
    found = evaluated(tmp_path / "run", make_spec(model_folder("llama"), (path, path)))
    assert not found.has_official


def test_a_reference_without_a_word_costs_no_evaluation(model_folder, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "..."}\n{"prompt": "b", "completion": "b"}\n')
    found = evaluated(tmp_path / "run", make_spec(model_folder("llama"), (path, path)))
    assert found.n_prompts == 2


def test_a_metric_of_ones_own(model_folder, rows, tmp_path) -> None:
    spec = make_spec(model_folder("llama"), rows)
    seen = []

    def mine(predictions, references):
        seen.append((predictions, references))
        return {"n": len(predictions)}

    found = evaluated(tmp_path / "a", spec, UserMetric("mine.py:mine", mine))
    ((predictions, references),) = seen
    assert found.own == {"n": 2.0} and len(predictions) == 2
    assert references == [[DEV[0]["completion"], DEV[2]["completion"]], [DEV[1]["completion"]]]
    assert json.loads((tmp_path / "a/result.json").read_text())["eval"]["own"] == {"n": 2.0}
    with pytest.raises(MetricError, match="mine failed: ZeroDivisionError") as failed:
        evaluated(tmp_path / "b", spec, UserMetric("mine.py:mine", lambda *_: 1 / 0))
    texts = tmp_path / "b/predictions.csv"
    assert f"; the texts are in {texts}, scores and losses in result.json" in str(failed.value)
    assert texts.exists()
    result = json.loads((tmp_path / "b/result.json").read_text())["eval"]
    assert result["nll"] == found.nll and "own" not in result
    assert (tmp_path / "b/predictions.jsonl").exists()


def test_documents_have_a_loss_and_no_texts(model_folder, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "One text."}\n{"text": "Another."}\n{"text": "One text."}\n')
    spec = make_spec(model_folder("llama"), (path, path), train__epochs=1)
    result = run_in(tmp_path / "run", spec)["eval"]
    assert (result["n_prompts"], result["n_rows"], result["predictions"]) == (0, 3, None)
    assert result["n_tokens"] == 2 * 10 + 9  # EOS behind each
    assert result["nll"] > 0 and "BLEU" not in result and "chrf" not in result


def test_documents_have_no_metric_of_ones_own(model_folder, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "One text."}\n')
    spec = make_spec(model_folder("llama"), (path, path))
    with pytest.raises(UserError, match=r"x\.py:f needs texts, and documents have no prompts"):
        evaluated(tmp_path / "run", spec, UserMetric("x.py:f", lambda *_: 1))


def test_prompts_beside_documents(model_folder, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"text": "One text."}\n{"prompt": "a", "completion": "b c"}\n{"text": "Two."}\n'
    )
    spec = make_spec(model_folder("llama"), (path, path))
    found = evaluated(tmp_path / "run", spec)
    (line,) = (tmp_path / "run/predictions.jsonl").read_text().splitlines()
    assert (found.n_prompts, found.n_rows) == (1, 3)
    assert json.loads(line)["n_tokens"] == 4  # b, a space, c and EOS
    assert found.n_tokens == 10 + 4 + 5
    with path.open("a") as file:
        file.write('{"prompt": "b", "completion": "d"}\n')
    assert "NLL" not in (intervals := evaluated(tmp_path / "two", spec).intervals)  # it is of all
    assert "BLEU" in intervals and Segments.read(tmp_path / "two").intervals() == intervals


def test_a_prompt_that_is_too_long_is_cut_where_it_was_asked_for(model_folder, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "ab" * 200, "completion": "c"}) + "\n")
    folder = model_folder("llama")
    with pytest.raises(UserError, match="the model's context is 256"):
        evaluated(tmp_path / "a", make_spec(folder, (path, path)))
    found = evaluated(tmp_path / "b", make_spec(folder, (path, path), data__truncate=True))
    assert (found.n_prompts, found.n_tokens) == (1, 2)
