"""The API in OpenAI's shapes, over the application without a socket."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

GREEDY = {"temperature": 0, "max_tokens": 20}


def reference(loaded, ids: list[int], n: int) -> list[int]:
    """What plain transformers says, greedily."""
    config = GenerationConfig(max_new_tokens=n, do_sample=False, eos_token_id=257, pad_token_id=257)
    with torch.no_grad():
        out = loaded.model.generate(torch.tensor([ids]), generation_config=config)
    return out[0, len(ids) :].tolist()


def events(response) -> list:
    """The data of a stream's events; the last one is [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def complete(client, **body):
    response = client.post("/v1/completions", json={"model": "tiny", **GREEDY} | body)
    assert response.status_code == 200, response.text
    return response


def test_any_of_several_end_tokens_ends_a_text(loaded, make, browse):
    prompt = list(b"Hello there")
    expected = reference(loaded, prompt, 20)
    token_id = expected[7]
    ends = replace(loaded, end_token_ids=(token_id, 257))
    with browse(make(model=ends)) as client:
        choice = complete(client, prompt="Hello there").json()["choices"][0]
    kept = expected[: expected.index(token_id)]
    assert choice["text"] == loaded.tokenizer.decode(kept)
    assert choice["finish_reason"] == "stop"


def test_models_are_listed_by_name(client):
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["tiny", "second.run", "study/first"]
    one = client.get("/v1/models/study/first").json()
    assert one == {**listed["data"][2], "object": "model", "owned_by": "swlora"}
    assert client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_a_greedy_completion_is_that_of_transformers(client, loaded):
    expected = reference(loaded, list(b"Hello there"), 20)
    answer = complete(client, prompt="Hello there").json()
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    (choice,) = answer["choices"]
    assert choice["text"] == loaded.tokenizer.decode(expected, skip_special_tokens=True)
    assert choice["finish_reason"] == ("stop" if 257 in expected else "length")
    usage = {"prompt_tokens": 11, "completion_tokens": len(expected)}
    assert answer["usage"] == {**usage, "total_tokens": 11 + len(expected)}


def test_a_prompt_may_be_tokens(client):
    as_text = complete(client, prompt="Hello there").json()["choices"]
    assert complete(client, prompt=list(b"Hello there")).json()["choices"] == as_text


def test_an_adapter_answers_to_its_name_with_its_own_text(client):
    texts = {
        name: complete(client, model=name, prompt="Hello there").json()["choices"][0]["text"]
        for name in ("tiny", "second.run", "study/first")
    }
    assert len(set(texts.values())) == 3
    with_separator = complete(client, model="second.run", prompt="Hello there\n").json()
    assert with_separator["choices"][0]["text"] == texts["second.run"]


def test_a_stream_has_the_same_text_in_pieces(client):
    whole = complete(client, prompt="Hello there", max_tokens=60).json()
    pieces = events(complete(client, prompt="Hello there", max_tokens=60, stream=True))
    assert "".join(p["choices"][0]["text"] for p in pieces) == whole["choices"][0]["text"]
    reasons = [p["choices"][0]["finish_reason"] for p in pieces]
    assert reasons == [None] * (len(pieces) - 1) + [whole["choices"][0]["finish_reason"]]
    assert len(pieces) > 5
    assert {p["id"] for p in pieces} == {pieces[0]["id"]}
    assert {p["object"] for p in pieces} == {"text_completion"}


def test_usage_comes_last_in_a_stream_that_asks_for_it(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    pieces = events(complete(client, prompt="Hi", **options))
    assert pieces[-1]["choices"] == []
    assert pieces[-1]["usage"]["total_tokens"] == 2 + pieces[-1]["usage"]["completion_tokens"]
    assert all(p["usage"] is None for p in pieces[:-1])


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(client):
    text = complete(client, prompt="Hello there", max_tokens=60).json()["choices"][0]["text"]
    stop = text[7:10]
    at = text.index(stop)
    for stream in (False, True):
        response = complete(
            client, prompt="Hello there", max_tokens=60, stop=["never said", stop], stream=stream
        )
        if stream:
            pieces = events(response)
            said = "".join(p["choices"][0]["text"] for p in pieces)
            reason = pieces[-1]["choices"][0]["finish_reason"]
        else:
            (choice,) = response.json()["choices"]
            said, reason = choice["text"], choice["finish_reason"]
        assert (said, reason) == (text[:at], "stop")


def test_a_seed_repeats_a_sampled_text(client):
    def sampled(**body):
        answer = complete(client, prompt="Hello", temperature=1.3, max_tokens=30, **body)
        return answer.json()["choices"][0]["text"]

    assert sampled(seed=5) == sampled(seed=5)
    assert len({sampled(seed=seed) for seed in range(4)} | {sampled()}) == 5


def test_logprobs_of_a_completion(client, loaded):
    answer = complete(client, prompt="Hello there", logprobs=3, max_tokens=6).json()
    (choice,) = answer["choices"]
    found = choice["logprobs"]
    tokens = reference(loaded, list(b"Hello there"), 6)
    assert found["tokens"] == [loaded.tokenizer.decode([t]) for t in tokens]
    ids = torch.tensor([list(b"Hello there") + tokens])
    with torch.no_grad():
        log_p = torch.log_softmax(loaded.model(ids).logits[0, 10:16].float(), dim=-1)
    expected = log_p[range(6), tokens].tolist()
    assert found["token_logprobs"] == pytest.approx(expected, abs=1e-4)
    assert all(1 <= len(top) <= 3 for top in found["top_logprobs"])
    best = [max(top.values()) for top in found["top_logprobs"]]
    assert best == pytest.approx(expected, abs=1e-4)  # greedy takes the likeliest
    assert found["text_offset"][0] == 0
    assert found["text_offset"] == sorted(found["text_offset"])


def test_the_logprobs_of_a_stream_are_those_of_the_whole(client):
    body = {"prompt": "Hello there", "logprobs": 2, "max_tokens": 12}
    whole = complete(client, **body).json()["choices"][0]["logprobs"]
    pieces = [p["choices"][0]["logprobs"] for p in events(complete(client, stream=True, **body))]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [value for p in pieces if p for value in p[name]] == whole[name]


def chat(client, **body):
    turns = [{"role": "user", "content": "Hi"}]
    response = client.post(
        "/v1/chat/completions", json={"model": "tiny", "messages": turns, **GREEDY} | body
    )
    assert response.status_code == 200, response.text
    return response


def test_a_chat_is_written_by_the_template(client, loaded):
    prompt = [256, *b"user:Hi;", 256, *b"assistant:"]
    expected = reference(loaded, prompt, 20)
    answer = chat(client).json()
    assert answer["object"] == "chat.completion"
    message = answer["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["content"] == loaded.tokenizer.decode(expected, skip_special_tokens=True)
    assert answer["usage"]["prompt_tokens"] == len(prompt)


def test_a_chat_streams_role_text_reason(client):
    whole = chat(client).json()["choices"][0]
    pieces = [p["choices"][0] for p in events(chat(client, stream=True))]
    assert pieces[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(p["delta"].get("content", "") for p in pieces) == whole["message"]["content"]
    assert pieces[-1]["finish_reason"] == whole["finish_reason"]


def test_logprobs_of_a_chat(client, loaded):
    body = {"logprobs": True, "top_logprobs": 2, "max_completion_tokens": 5, "max_tokens": None}
    found = chat(client, **body).json()["choices"][0]["logprobs"]["content"]
    assert len(found) == 5
    for entry in found:
        assert len(entry["top_logprobs"]) == 2
        top = entry["top_logprobs"][0]
        assert (top["token"], top["logprob"]) == (entry["token"], entry["logprob"])
        if entry["bytes"] is not None:
            assert bytes(entry["bytes"]).decode() == entry["token"]
    assert chat(client).json()["choices"][0]["logprobs"] is None


def test_a_model_without_a_template_has_no_chat(client, monkeypatch):
    service = client.app.app.state.service
    monkeypatch.setattr(service.loaded.tokenizer, "chat_template", None)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    response = client.post("/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "no_chat_template")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content.__class__.__mro__[1].__subclasses__() }}",  # out of the sandbox
        "{{ raise_exception('no such roles') }}",
        "{% for %}",
        "{{ 1 / 0 }}",
        "{% set messages[0].content = 'x' %}",
    ],
)
def test_a_template_that_misbehaves_is_a_refusal(client, monkeypatch, template):
    service = client.app.app.state.service
    monkeypatch.setattr(service.loaded.tokenizer, "chat_template", template)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "<class" not in response.text


# Around the API


def test_health_readiness_and_numbers(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    complete(client, prompt="Hello", max_tokens=7)
    client.post("/v1/completions", json={"model": "tiny"})
    client.get("/v1/models/study/first")
    client.get("/nowhere/42")
    lines = client.get("/metrics").text.split("\n")
    post = 'swlora_requests_total{method="POST",route="/v1/completions"'
    assert f'{post},status="200"}} 1.0' in lines
    assert f'{post},status="400"}} 1.0' in lines
    assert (
        'swlora_requests_total{method="GET",route="/v1/models/{name:path}",status="200"} 1.0'
        in lines
    )
    assert 'swlora_requests_total{method="GET",route="none",status="404"} 1.0' in lines
    assert 'swlora_requests_total{method="GET",route="/health",status="200"} 1.0' in lines
    assert 'swlora_tokens_total{kind="prompt"} 5.0' in lines
    assert 'swlora_tokens_total{kind="generated"} 7.0' in lines
    assert 'swlora_texts_total{reason="length"} 1.0' in lines
    assert "swlora_first_token_seconds_count 1.0" in lines
    assert {"swlora_waiting 0.0", "swlora_active 0.0"} <= set(lines)


def test_a_mistake_of_ours_is_a_500_that_tells_nothing(client, monkeypatch, caplog):
    from swlora.web.service import Service

    def broken(*_arguments):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(Service, "variant", broken)
    response = client.post("/v1/completions", json={"model": "tiny", "prompt": "Hi"})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert response.headers["x-content-type-options"] == "nosniff"
    assert client.get("/health").status_code == 200


def test_the_schema_is_there_and_loads_nothing_from_elsewhere(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert "/v1/chat/completions" in paths
    assert client.get("/docs").status_code == 404
