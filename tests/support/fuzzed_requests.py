"""Strange requests, drawn at random: odd fields, bodies, headers and paths."""

import json
import random
import string
from typing import Any

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


def strange_request(client: Any, pick: random.Random) -> tuple[Any, str]:
    """Send a strange request; return the response, and in words what was sent and came back."""
    path = target(pick)
    method = "POST" if pick.random() < 0.9 else pick.choice(["GET", "PUT", "DELETE", "PATCH"])
    content, chosen = body(pick, path.partition("?")[0]), headers(pick)
    response = client.request(method, path, content=content, headers=chosen)
    sent = f"{method} {path} {chosen} {content[:300]!r}"
    return response, f"{sent} -> {response.status_code} {response.text[:200]}"
