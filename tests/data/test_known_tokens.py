"""A tokenizer with a token that the model has no embedding for, as Gemma 3's text models have."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.small_runs import make_spec, write_data

from swlora import pipeline
from swlora.config import DecodeSpec, ModelSpec, RunSpec
from swlora.data import known_tokens
from swlora.data.encode import Encoded
from swlora.data.examples import Example
from swlora.data.known_tokens import check_prompts, check_sequences
from swlora.data.token_sequences import TokenSequences
from swlora.errors import DataError, UserError
from swlora.evaluation.prompting import Prompt, generate_text
from swlora.models import load
from swlora.models.load import load_model
from swlora.progress import Silent
from swlora.runs import Run
from swlora.superweights.detect import prompt_tokens

N_EMBEDDINGS, SEEN = 258, "<image_soft_token>"  # the tokenizer's own tokens, and the one beyond


@pytest.fixture
def folder(make_model, tiny_tokenizer, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(load, "hub_reachable", lambda: False)
    model = make_model("gemma3_text", vocab_size=N_EMBEDDINGS)
    model.save_pretrained(tmp_path)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [SEEN]})
    assert tokenizer(SEEN).input_ids == [N_EMBEDDINGS]
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def spec(folder: Path) -> ModelSpec:
    return ModelSpec(name=str(folder), dtype="float32", device="cpu")


def test_the_model_is_served_and_texts_with_the_token_are_not(folder):
    loaded = load_model(spec(folder))
    run = RunSpec(model=spec(folder), decode=DecodeSpec(max_new_tokens=5))
    ids = loaded.model.generate(torch.tensor([list(b"see")]), max_new_tokens=5, eos_token_id=257)
    expected = loaded.tokenizer.decode(ids[0, 3:], skip_special_tokens=True)
    assert generate_text(run, Prompt("see"), None, Silent()).text == expected
    refused = f"a text holds the token '{SEEN}', which this model has no embedding for"
    with pytest.raises(UserError, match=refused):
        generate_text(run, Prompt(f"see {SEEN}"), None, Silent())
    with pytest.raises(UserError, match=refused):
        prompt_tokens(loaded.model, loaded.tokenizer, SEEN)


@pytest.mark.parametrize("block_tokens", [1, 4, 1 << 20])
def test_rows_are_named(block_tokens, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(known_tokens, "_BLOCK_TOKENS", block_tokens)
    rows = [([1, 2], [3]), ([4], [5, 6]), ([7, 256], [8]), ([9], [257])]
    encoded = Encoded(TokenSequences.from_lists(rows), np.array([0, 1, 1, 2]), 0, {})
    examples = [Example("a", "b"), Example("c", "d", source="a.jsonl, line", number=9)]
    examples.append(Example("e", "f"))
    check_sequences(encoded, examples, tiny_tokenizer, 258)
    with pytest.raises(DataError, match=r"^a.jsonl, line 9 holds the token '<s>', which this"):
        check_sequences(encoded, examples, tiny_tokenizer, 256)
    with pytest.raises(DataError, match=r"^row 3 holds the token '</s>'"):
        check_sequences(encoded, examples, tiny_tokenizer, 257)
    check_prompts([[1, 2], [256]], tiny_tokenizer, 257)
    with pytest.raises(UserError, match="the token '</s>'"):
        check_prompts([[1, 2], [257]], tiny_tokenizer, 257)


@pytest.mark.parametrize("n_embeddings", [257, 200])
def test_a_tokenizer_of_another_model_is_refused(n_embeddings, folder, make_model):
    """Its end of sequence, or its ordinary vocabulary, lies beyond the embeddings."""
    config = {"vocab_size": n_embeddings, "bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 6}
    make_model("gemma3_text", **config).save_pretrained(folder)
    with pytest.raises(UserError, match=rf"knows 259 tokens but the model embeds {n_embeddings}"):
        load_model(spec(folder))


def test_a_padding_token_beyond_is_replaced(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": SEEN}))
    assert load_model(spec(folder)).tokenizer.pad_token == "</s>"


@pytest.mark.parametrize("command", ["train", "train-eval"])
def test_a_row_with_the_token_stops_the_run(command, folder, tmp_path):
    data = write_data(tmp_path)
    name = {"train": "train.jsonl", "train-eval": "dev.jsonl"}[command]
    rows = (tmp_path / name).read_text().replace("has", SEEN).replace("name[E]", f"name{SEEN}")
    (tmp_path / name).write_text(rows)
    spec = make_spec(folder, data)
    work = {"train": pipeline.train, "train-eval": pipeline.train_evaluate}[command]
    refusal = pytest.raises(UserError, match=f"holds the token '{SEEN}'")
    with refusal as refused, Run.create(tmp_path / "run", spec, command) as run:
        work(pipeline.Job(spec, run, Silent()))
    path = tmp_path / name
    assert str(refused.value).startswith(f"{path}, line 1 ")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
