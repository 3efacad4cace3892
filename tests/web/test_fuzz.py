"""A thousand strange requests: a clear 4xx or an answer, never a 5xx, and the server lives on."""

import json
import random
import string

import pytest

PATHS = [
    "/v1/completions",
    "/v1/chat/completions",
    "/api/generate",
    "/api/restaurant",
    "/v1/models/x",
    "/api/run",
    "/api/run/metrics",
    "/",
]
GOOD = {
    "/v1/completions": {"model": "tiny", "prompt": "Hi", "max_tokens": 2},
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 2,
    },
    "/api/generate": {"prompt": "Hi", "sides": [{"model": "tiny"}], "max_tokens": 2},
    "/api/restaurant": {"fields": {"name": "Aromi"}},
}
FIELDS = [
    *("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p"),
    *("n", "seed", "stop", "stream", "stream_options", "logprobs", "top_logprobs", "best_of"),
    *("repetition_penalty", "sides", "fields", "zeroed", "echo", "user", "top_k", "suffix"),
    *("frequency_penalty", "presence_penalty", "tools", "metadata", "logit_bias", "store"),
]
# What JSON can carry, and what it should not.
RAW_VALUES = [
    *("null", "true", "false", "0", "-1", "1", "2", "1.5", "-0.0", "1e9", "1e400", "-1e400", "NaN"),
    *(
        "Infinity",
        "-Infinity",
        "9" * 25,
        "9" * 5000,
        '""',
        '" "',
        '"tiny"',
        '"\\u0000"',
        '"\\ud800"',
    ),
    *('"\\udfff\\ud800"', '"<script>alert(1)</script>"', '"../../etc/passwd"', "[]", "{}", "[[]]"),
    *('[""]', '["a","b"]', "[-1]", "[999999999]", "[1,2,3]", "[1.5]", '{"role":"user"}', "[null]"),
    '[{"role":"user","content":"Hi"}]',
    '[{"role":"tool","content":"Hi"}]',
    '[{"role":"user","content":null}]',
    '[{"role":"user","content":"\\ud800"}]',
    '[{"model":"tiny"}]',
    '[{"model":"tiny","zeroed":["1:mlp.down_proj:7:11"]}]',
    '[{"model":"tiny","zeroed":["\\u0000"]}]',
    '{"include_usage":true}',
    '{"name":"\\u202e[x]"}',
    '{"a":' * 50 + "1" + "}" * 50,
    "[" * 5000 + "]" * 5000,
    '"' + "x" * 3000 + '"',
    '"' + "語" * 600 + '"',
]
WHOLE = [
    *(b"", b"null", b"[]", b"{}", b"0", b'"x"', b"{", b'{"a"', b"\x00", b"\xff\xfe", b"\x80" * 9),
    *(b'{"model":"tiny","model":"tiny"}', b"{}{}", b" " * 9000, b"[" * 60_000, b'{"a":' * 9000),
    *("{}".encode("utf-16"), "{}".encode("utf-32"), b"\xef\xbb\xbf{}", b"// no\n{}", b"{'a': 1}"),
]
TYPES = ["application/json", "application/json; charset=utf-8", "application/json;charset=utf-16"]
HEADERS = {
    "content-type": [*TYPES * 8, "text/plain", "application/x-www-form-urlencoded", "", "x" * 500],
    "host": [*["localhost:8000"] * 20, "evil.example", "[::1", "a:b:c", "", "localhost:99999"],
    "origin": ["null", "http://localhost:8000", "http://evil", "", "x" * 900, "http://[", "\xff"],
    "authorization": ["Bearer", "Bearer x", "Basic", "Basic %%%", "Basic eA==", "\xff", "x" * 900],
    "content-length": ["0", "1", "-1", "99999999999999999999", "x", "1e3"],
    "transfer-encoding": ["chunked", "gzip", "identity", "chunked, chunked"],
    "accept": ["text/event-stream", "*/*", "\xff"],
    "range": ["bytes=0-" + ",0-" * 300, "bytes=-1", "x"],
    "sec-fetch-site": ["same-origin", "none", "cross-site", "same-site", "x"],
    "cookie": ["a=" + "b" * 5000, ";" * 500, "\xff"],
    "expect": ["100-continue", "x"],
    "x-forwarded-for": ["127.0.0.1", "<script>"],
}


def body(pick: random.Random, path: str) -> bytes:
    """A body: strange as a whole, or a good one with strange fields."""
    if pick.random() < 0.15:
        return pick.choice(WHOLE)
    if pick.random() < 0.05:
        return pick.randbytes(pick.randint(0, 400))
    fields = {name: json.dumps(value) for name, value in GOOD.get(path, {}).items()}
    for _ in range(pick.choice([0, 1, 1, 2, 3])):
        name = pick.choice(FIELDS)
        if pick.random() < 0.1:
            name = pick.choice(["", "\\ud800", "__class__", "\\u0000", "x" * 300, "a.b[0]"])
        fields[name] = pick.choice(RAW_VALUES)
    return ("{" + ",".join(f'"{k}":{v}' for k, v in fields.items()) + "}").encode()


def headers(pick: random.Random) -> list[tuple[str, bytes]]:
    chosen = {"content-type": "application/json"}
    if pick.random() < 0.3:
        for name in pick.sample(sorted(HEADERS), pick.randint(1, 3)):
            chosen[name] = pick.choice(HEADERS[name])
    if pick.random() < 0.03:
        chosen |= {f"x-{i}": "y" * pick.choice([1, 200]) for i in range(pick.choice([5, 120]))}
    return [(name, value.encode("latin-1")) for name, value in chosen.items()]


def target(pick: random.Random) -> str:
    path = pick.choice(PATHS[:4] * 4 + PATHS)
    if pick.random() < 0.1:
        noise = "".join(pick.choices(string.printable.strip() + "%00%ff", k=9)).replace("#", "")
        path += "?" + noise + "&since=" + pick.choice(["-1", "x", "9" * 30, ""])
    return path


@pytest.mark.parametrize("part", range(4))
def test_a_thousand_strange_requests(client, part):
    pick = random.Random(part)
    counts: dict[int, int] = {}
    for i in range(250):
        path = target(pick)
        method = "POST" if pick.random() < 0.9 else pick.choice(["GET", "PUT", "DELETE", "PATCH"])
        content, chosen = body(pick, path.partition("?")[0]), headers(pick)
        response = client.request(method, path, content=content, headers=chosen)
        what = f"request {i}: {method} {path} {chosen} {content[:300]!r} -> {response.text[:200]}"
        assert 200 <= response.status_code < 500, what
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
