"""Answers of chats stop at the token that ends a turn, though no configuration names it."""

import csv
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient
from tests.support.chat_templates import CHATML, SPECIAL, chat, chat_tokenizer
from tests.support.data_files import write_rows

from swlora.config import DataSpec, DecodeSpec, ModelSpec, RunSpec, ServeSpec
from swlora.data.encode import encode_prompts
from swlora.evaluation.decode import chat_end_token_ids
from swlora.models.load import load_model
from swlora.pipeline import Job, evaluate_adapter
from swlora.progress import Silent
from swlora.runs import Run
from swlora.web.app import create_app
from swlora.web.guard import Policy
from swlora.web.service import make_service

END, N_NEW = SPECIAL["<|im_end|>"], 12
QUESTIONS = ("Hi", "And you?")


@pytest.fixture
def base_model(make_model, tmp_path) -> tuple[Path, str]:
    """(The folder of a base model with a ChatML template, what it answers to "Hi").

    Its output row of an ordinary token is exchanged with that of <|im_end|>, so that this token
    comes where the other would, in the middle of the answer to "Hi".
    """
    tokenizer = chat_tokenizer(CHATML)
    prompt = encode_prompts([chat((("user", "Hi"),))], "", tokenizer)
    for seed in range(30):  # until a model says something new in the middle
        model = make_model("llama", seed=seed, vocab_size=272)
        new = model.generate(torch.tensor(prompt), max_new_tokens=N_NEW, do_sample=False)
        new = new[0, len(prompt[0]) :].tolist()
        places = [i for i in range(3, len(new)) if new[i] < 128 and new[i] not in new[:i]]
        if places and all(32 < token_id < 127 for token_id in new[: places[0]]):
            break
    at = places[0]
    head = model.lm_head.weight.data
    head[[END, new[at]]] = head[[new[at], END]]
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, tokenizer.decode(new[:at], skip_special_tokens=True)


def test_eval_and_serve_stop_at_the_end_of_a_turn(base_model, tmp_path, no_java):
    folder, answer = base_model
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "Fine."}]}
        for q in QUESTIONS
    ]
    data = write_rows(tmp_path / "chats.jsonl", rows)
    spec = RunSpec(
        model=ModelSpec(name=str(folder), dtype="float32"),
        data=DataSpec(name=str(data), eval_file=data),
        decode=DecodeSpec(max_new_tokens=N_NEW),
    )
    loaded = load_model(spec.model)
    assert END not in loaded.end_token_ids
    assert chat_end_token_ids(loaded) == (*loaded.end_token_ids, END)

    with Run.create(tmp_path / "run", spec, "eval") as run:
        evaluate_adapter(Job(spec, run, Silent()), None)
    with (run.folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        said = list(csv.reader(file))[1]
    assert said[1] == " ".join(answer.split())

    app = create_app(make_service(ServeSpec(runs=tmp_path), loaded), Policy())
    with TestClient(app, base_url="http://localhost:8000") as client:
        body = {"model": "base", "messages": rows[0]["messages"][:1], "temperature": 0}
        reply = client.post("/v1/chat/completions", json={**body, "max_tokens": N_NEW}).json()
    assert reply["choices"][0]["message"]["content"] == answer
    assert reply["choices"][0]["finish_reason"] == "stop"
