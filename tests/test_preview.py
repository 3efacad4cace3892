"""Rows as the model sees them; and what a training says of its data when it begins."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.support.chat_families import FAMILIES
from tests.support.data_files import write_rows
from tests.support.small_runs import DEV, ROWS, Heard, make_spec, write_data

from swlora import pipeline
from swlora.config import load_spec
from swlora.data.summary import DataSummary, short_lines
from swlora.job import Job
from swlora.preview import Span, preview_data, spans, special_ids
from swlora.progress import Silent
from swlora.result_json import as_json, from_json
from swlora.run_record import MemoryRecord
from swlora.runs import Run

BOS, EOS = 256, 257


# Spans


def test_the_texts_of_the_spans_are_what_the_tokens_decode_to(tiny_tokenizer: Any) -> None:
    ids = [BOS, *"Né 🎉\n".encode(), EOS, *b"x", EOS]
    weights = [0.0] * 3 + [1.0] * (len(ids) - 5) + [0.5, 0.0]
    found = spans(ids, weights, tiny_tokenizer, special_ids(tiny_tokenizer))
    assert "".join(span.text for span in found) == tiny_tokenizer.decode(ids)
    # Of "é" the first byte is not trained and the second is: it stands with the second.
    assert found == [
        Span("<s>", 0.0, True),
        Span("N", 0.0, False),
        Span("é 🎉\n", 1.0, False),
        Span("</s>", 1.0, True),
        Span("x", 0.5, False),
        Span("</s>", 0.0, True),
    ]


def test_bytes_that_are_no_text_are_shown_in_their_place(tiny_tokenizer: Any) -> None:
    found = spans([*b"a", 0xC3, EOS], [0.0, 1.0, 1.0], tiny_tokenizer, special_ids(tiny_tokenizer))
    assert "".join(span.text for span in found) == "a\N{REPLACEMENT CHARACTER}</s>"


def test_a_token_that_is_added_and_not_special_is_text(tiny_tokenizer: Any) -> None:
    assert special_ids(tiny_tokenizer) == {BOS, EOS}


# Rows


def test_a_row_of_several_sequences_is_shown_with_all_of_them(model_folder, tmp_path) -> None:
    """Earlier reasoning is left out behind a new question, so each answer has its own context."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama"), folder)
    (folder / "chat_template.jinja").write_text(FAMILIES["Qwen 3"])
    turns = [("user", "Hi"), ("assistant", "<think>\nH\n</think>\n\nYes?"), ("user", "A")]
    turns.append(("assistant", "<think>\nO\n</think>\n\nB"))
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    other = {"messages": row["messages"][:2]}
    path = write_rows(tmp_path / "rows.jsonl", [row, other])
    spec = load_spec(None, {"model.name": str(folder), "data.name": str(path)})
    found = preview_data(spec, 1, Silent())
    (shown,) = found.shown
    assert (shown.place, shown.n_sequences) == (f"{path}, line 1", 2)
    texts = ["".join(span.text for span in sequence.spans) for sequence in shown.sequences]
    assert "H\n</think>" in texts[0] and "H\n</think>" not in texts[1]
    assert (found.summary.train.n_rows, found.summary.train.n_sequences) == (1, 2)


# The beginning of a training


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_a_training_says_what_it_is_trained_on(model_folder, tmp_path, engine) -> None:
    spec = make_spec(
        model_folder("llama"), write_data(tmp_path), train__max_steps=1, train__engine=engine
    )
    heard = Heard()
    job = Job(spec, MemoryRecord(), heard)
    pipeline.train(job)
    block = job.run.read_result()["data"]
    summary = from_json(DataSummary, block)
    assert set(short_lines(summary)) <= set(heard.lines)
    assert (summary.train.n_rows, summary.train.n_prompts) == (len(ROWS), 4)
    assert summary.train.n_rows_sharing == len(ROWS) and summary.held_out is None
    assert ("steps" in block) == (engine == "auto")  # padded batches have no trees
    preview = preview_data(spec, 0, Silent())
    assert as_json(preview.summary.train) == block["train"]
    assert preview.summary.steps == summary.steps
    assert preview.summary.held_out is not None
    assert preview.summary.held_out.n_rows == len(DEV)


def test_the_block_is_in_the_run_folder(model_folder, tmp_path: Path) -> None:
    spec = make_spec(model_folder("llama"), write_data(tmp_path), train__max_steps=1)
    with Run.create(tmp_path / "run", spec, "train") as run:
        pipeline.train(Job(spec, run, Silent()))
    assert run.read_result().keys() >= {"data", "train"}
    assert from_json(DataSummary, run.read_result()["data"]).train.n_rows == len(ROWS)
