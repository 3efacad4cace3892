"""A thousand strange requests: a clear 4xx or an answer, never a 5xx, and the server lives on."""

import json
import random

import pytest
from tests.support.fuzzed_requests import GOOD, strange_request


@pytest.mark.parametrize("part", range(4))
def test_a_thousand_strange_requests(client, part):
    pick = random.Random(part)
    counts: dict[int, int] = {}
    for i in range(250):
        response, what = strange_request(client, pick)
        assert 200 <= response.status_code < 500, f"request {i}: {what}"
        assert "Traceback" not in response.text
        if response.status_code >= 400 and response.headers["content-type"] == "application/json":
            assert len(response.json()["error"]["message"]) < 400
        counts[response.status_code] = counts.get(response.status_code, 0) + 1
    assert counts[200] >= 5  # some of them are meant to be good
    assert counts[400] >= 50
    answer = client.post("/v1/completions", json=GOOD["/v1/completions"])
    assert answer.status_code == 200
    assert client.get("/ready").status_code == 200


REFUSED = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 401}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"temperature": 2.01}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"repetition_penalty": 0.4}, "repetition_penalty"),
    ({"repetition_penalty": 2.1}, "repetition_penalty"),
    ({"n": 129}, "n"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"seed": 2**63}, "seed"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": "x" * 65}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [300]}, "prompt"),
    ({"prompt": ["a", 7]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"best_of": 2}, "best_of"),
    ({"stream_options": {"include_usage": 1}}, "stream_options"),
]


@pytest.mark.parametrize(("change", "param"), REFUSED)
def test_every_number_has_its_bounds(client, change, param):
    response = client.post("/v1/completions", json=GOOD["/v1/completions"] | change)
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["param"] or error["message"]).startswith(param)
    assert error["type"] == "invalid_request_error"


def test_prompt_and_answer_fit_the_context_together(client):
    def ask(n_prompt: int, **more):
        body = {"model": "tiny", "prompt": [65] * n_prompt, **more}
        return client.post("/v1/completions", json=body)

    assert ask(112, max_tokens=400).status_code == 200
    refused = ask(113, max_tokens=400)
    assert (refused.status_code, refused.json()["error"]["code"]) == (
        400,
        "context_length_exceeded",
    )
    short = ask(511)  # nothing was said: as much as there is room for
    assert short.json()["usage"]["completion_tokens"] == 1
    assert ask(512).json()["error"]["code"] == "context_length_exceeded"
    assert ask(20_000).status_code == 400


@pytest.mark.parametrize("prompt", ["", " ", "\n\n", "\x00", "\ufeff", "<s>", "</s>", "�"])
def test_hardly_a_prompt_is_still_one(client, prompt):
    for path, text in (
        ("/v1/completions", {"prompt": prompt}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": prompt}]}),
    ):
        response = client.post(path, json={"model": "tiny", "max_tokens": 3, **text})
        assert response.status_code == 200, response.text


def test_what_a_model_says_cannot_leave_its_string(client, monkeypatch):
    """A stream's events end at line breaks; text that holds some is escaped."""
    tokenizer = client.app.app.state.service.loaded.tokenizer
    nasty = 'a\n\ndata: [DONE]\r\n</script>"\u2028'
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **_: nasty * len(ids))
    body = {"model": "tiny", "prompt": "Hi", "max_tokens": 3, "temperature": 0, "stream": True}
    raw = client.post("/v1/completions", json=body).text
    lines = [line for line in raw.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    said = [json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]]
    assert set("".join(said)) == set(nasty)
    assert raw.isascii()
