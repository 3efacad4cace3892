"""Several prompts, several choices, echoed prompts with their probabilities, in one request."""

import json

import pytest
import torch
from openai import OpenAI

from swlora.config import ServeSpec
from swlora.decoding.batch import BatchDecoder
from swlora.web.service import make_service

BODY = {"model": "tiny", "max_tokens": 12, "temperature": 0}
PROMPTS = ["Hello there", "x", "A longer prompt than the others"]


def complete(client, **body):
    response = client.post("/v1/completions", json=BODY | body)
    assert response.status_code == 200, response.text
    return response.json()


def events(client, path="/v1/completions", **body) -> list[dict]:
    response = client.post(path, json=BODY | {"stream": True} | body)
    lines = [line for line in response.text.split("\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_choices_come_in_the_order_of_the_prompts(client):
    alone = [complete(client, prompt=prompt) for prompt in PROMPTS]
    expected = [{**a["choices"][0], "index": i} for i, a in enumerate(alone)]
    for prompts in (PROMPTS, [list(p.encode()) for p in PROMPTS]):
        together = complete(client, prompt=prompts)
        assert together["choices"] == expected
        for name, n in together["usage"].items():
            assert n == sum(answer["usage"][name] for answer in alone)
    assert complete(client, prompt=PROMPTS[:1])["choices"] == expected[:1]


def test_choices_differ_and_a_seed_repeats_them_all(client):
    body = {"temperature": 1.2, "seed": 7, "max_tokens": 30}
    alone = complete(client, prompt=PROMPTS[0], **body)["choices"][0]["text"]
    three = complete(client, prompt=PROMPTS[:2], n=3, **body)
    texts = [choice["text"] for choice in three["choices"]]
    assert [choice["index"] for choice in three["choices"]] == list(range(6))
    assert len(set(texts)) == 6
    assert texts[0] == alone  # a choice is the same, however many there are
    two = complete(client, prompt=PROMPTS[:2], n=2, best_of=2, **body)
    assert [c["text"] for c in two["choices"]] == [texts[0], texts[1], texts[3], texts[4]]
    assert three["usage"]["prompt_tokens"] == len(PROMPTS[0]) + len(PROMPTS[1])


def test_a_stream_of_several_texts_names_the_choice_of_every_piece(client):
    body = {"prompt": PROMPTS, "n": 2, "temperature": 0.9, "seed": 1}
    whole = complete(client, **body)
    pieces = events(client, stream_options={"include_usage": True}, **body)
    assert pieces[-1]["usage"] == whole["usage"]
    texts, reasons = [""] * 6, [None] * 6
    for piece in pieces[:-1]:
        (choice,) = piece["choices"]
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert reasons == [choice["finish_reason"] for choice in whole["choices"]]


def test_a_chat_has_several_choices(client):
    body = {**BODY, "messages": [{"role": "user", "content": "Hi"}], "n": 3, "temperature": 1}
    answer = client.post("/v1/chat/completions", json=body | {"seed": 4}).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(set(texts)) == 3
    pieces = events(client, "/v1/chat/completions", **body, seed=4)
    streamed = ["", "", ""]
    for piece in pieces:
        (choice,) = piece["choices"]
        streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == texts


def test_more_texts_than_places_are_refused_at_once(make, browse):
    with browse(make(max_rows=2, queue=3)) as client:
        refused = client.post("/v1/completions", json={**BODY, "prompt": PROMPTS, "n": 2})
        assert refused.status_code == 400
        message = refused.json()["error"]["message"]
        assert message == "6 texts were asked for, prompts times n; this server takes 5"
        assert len(complete(client, prompt=["x"] * 5)["choices"]) == 5


def test_top_k_of_one_is_greedy(client):
    greedy = complete(client, prompt="Hello there")["choices"]
    assert complete(client, prompt="Hello there", temperature=2, top_k=1)["choices"] == greedy
    assert complete(client, prompt="Hello there", temperature=2, seed=1)["choices"] != greedy


def test_penalties_reach_the_sampling(client, loaded):
    """Greedy decoding by hand, scores as in the OpenAI API's formula."""
    ids, written = list(b"Hello there"), []
    for _ in range(12):
        with torch.no_grad():
            mu = loaded.model(torch.tensor([ids + written])).logits[0, -1]
        for token in set(written):
            mu[token] -= written.count(token) * 0.7 + 0.4
        written.append(int(mu.argmax()))
    expected = loaded.tokenizer.decode(written, skip_special_tokens=True)
    penalties = {"frequency_penalty": 0.7, "presence_penalty": 0.4}
    found = complete(client, prompt="Hello there", **penalties)["choices"][0]["text"]
    assert found == expected
    assert found != complete(client, prompt="Hello there")["choices"][0]["text"]


# Echo


def log_p(loaded, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(loaded.model(torch.tensor([ids])).logits[0].float(), dim=-1)


def test_an_echoed_prompt_has_its_probabilities(client, loaded):
    prompt = "Hello there, é!"
    for given, n_new in ((prompt, 0), (list(prompt.encode()), 0), (prompt, 3)):
        answer = complete(client, prompt=given, echo=True, logprobs=2, max_tokens=n_new)
        (choice,) = answer["choices"]
        plain = complete(client, prompt=given, max_tokens=3)["choices"][0]["text"]
        assert choice["text"] == prompt + (plain if n_new else "")
        assert answer["usage"]["completion_tokens"] == n_new
        assert choice["finish_reason"] == "length"
        found, ids = choice["logprobs"], list(prompt.encode())
        ids += reference_tokens(loaded, ids, n_new)
        expected = log_p(loaded, ids)[range(len(ids) - 1), ids[1:]].tolist()
        assert found["tokens"] == [loaded.tokenizer.decode([t]) for t in ids]
        assert found["token_logprobs"][0] is None
        assert found["top_logprobs"][0] is None
        assert found["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
        rows = zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
        for token, value, top in list(rows)[1:]:  # the two likeliest, and the token itself
            assert len(top) <= 3 and value <= top[token] <= max(top.values())
        before = [len(prompt.encode()[:t].decode(errors="ignore")) for t in range(len(ids) - n_new)]
        assert found["text_offset"][: len(before)] == before
        assert all(offset >= len(prompt) for offset in found["text_offset"][len(before) :])


def reference_tokens(loaded, ids: list[int], n: int) -> list[int]:
    written: list[int] = []
    for _ in range(n):
        written.append(int(log_p(loaded, ids + written)[-1].argmax()))
    return written


def test_echo_without_probabilities_and_in_a_stream(client):
    plain = complete(client, prompt="Hello there")["choices"][0]["text"]
    echoed = complete(client, prompt="Hello there", echo=True)["choices"][0]
    assert (echoed["text"], echoed["logprobs"]) == ("Hello there" + plain, None)
    body = {"prompt": "Hello there", "echo": True, "logprobs": 1}
    whole = complete(client, **body)["choices"][0]
    parts = [piece["choices"][0] for piece in events(client, **body)]
    assert "".join(part["text"] for part in parts) == whole["text"]
    for name in ("tokens", "token_logprobs", "text_offset"):
        streamed = [v for part in parts if part["logprobs"] for v in part["logprobs"][name]]
        assert streamed == whole["logprobs"][name]


def test_an_adapters_prompt_is_echoed_with_what_is_put_behind_it(client):
    asked = {"model": "second.run", "echo": True, "max_tokens": 0, "logprobs": 0}
    found = complete(client, prompt="Hello", **asked)["choices"][0]
    assert found["text"] == "Hello\n"
    assert len(found["logprobs"]["tokens"]) == 6


def test_the_token_that_ends_a_text_is_among_the_probabilities(client, loaded, monkeypatch):
    """lm-evaluation-harness takes the last one for that of its one new token, whatever it is."""
    ids = list(b"Hello there")
    (end,) = reference_tokens(loaded, ids, 1)

    def ending(model, *, eos_token_ids, **options):
        return BatchDecoder(model, eos_token_ids=[end], **options)

    monkeypatch.setattr("swlora.web.variants.BatchDecoder", ending)
    client.app.app.state.service.scheduler._host._decoders.clear()
    body = {"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 1}
    (choice,) = complete(client, **body)["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == "Hello there"
    assert len(choice["logprobs"]["tokens"]) == len(ids) + 1


# What lm-evaluation-harness 0.4 sends for a log-likelihood, by its model local-completions


def test_log_likelihoods_as_lm_evaluation_harness_asks_for_them(client, loaded):
    """Its request and its arithmetic: the continuation's sum, and whether it is greedy."""
    contexts = [b"Question: why?\nAnswer:", b"Q:"]
    greedy = [list(c) + reference_tokens(loaded, list(c), 4) for c in contexts]
    rows = [list(contexts[0] + b" because"), list(contexts[1] + b" no"), *greedy]
    lengths = [len(contexts[0]), len(contexts[1])] * 2
    body = {"model": "tiny", "prompt": rows, "temperature": 0, "max_tokens": 1, "logprobs": 1}
    response = client.post("/v1/completions", json={**body, "seed": 1234, "echo": True})
    assert response.status_code == 200, response.text
    choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
    for choice, row, n_context in zip(choices, rows, lengths, strict=True):
        found = choice["logprobs"]
        values = found["token_logprobs"][n_context:-1]
        top = found["top_logprobs"][n_context:-1]
        p = log_p(loaded, row)
        expected = float(p[range(n_context - 1, len(row) - 1), row[n_context:]].sum())
        assert sum(values) == pytest.approx(expected, abs=1e-3)
        is_greedy = all(v == max(best.values()) for v, best in zip(values, top, strict=True))
        assert is_greedy == (row in greedy)


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_the_official_client_sees_it_all(run_server, loaded, runs):
    service = make_service(ServeSpec(runs=runs), loaded)
    with run_server(service) as running:
        client = OpenAI(base_url=f"{running.url}/v1", api_key="unused", max_retries=0)
        answer = client.completions.create(
            model="tiny",
            prompt=PROMPTS,
            n=2,
            best_of=2,
            echo=True,
            logprobs=1,
            max_tokens=0,
            user="me",
            frequency_penalty=0,
            presence_penalty=0,
            logit_bias={},
        )
        assert [choice.text for choice in answer.choices] == [p for p in PROMPTS for _ in range(2)]
        assert answer.choices[0].logprobs.token_logprobs[0] is None
        turns = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
        settings = {"temperature": 0, "max_completion_tokens": 9, "store": False, "tools": []}
        first = client.chat.completions.create(model="tiny", messages=turns, **settings)
        turns += [first.choices[0].message, {"role": "user", "content": "And?"}]
        second = client.chat.completions.create(model="tiny", messages=turns, **settings, n=2)
        assert second.choices[0].message.content == second.choices[1].message.content
