"""Fields that change nothing are taken, others refused by name, and no message tells internals."""

import re

import pytest

COMPLETION = {"model": "tiny", "prompt": "Hello there", "max_tokens": 8, "temperature": 0}
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": 8,
    "temperature": 0,
}
NEUTRAL = {
    "frequency_penalty": [0, 0.0, None],
    "presence_penalty": [0, None],
    "user": ["somebody", None],
    "safety_identifier": ["x"],
    "prompt_cache_key": ["x"],
    "store": [False, True, None],
    "metadata": [{}, {"run": "7"}, None],
    "logit_bias": [{}, None],
    "n": [1, None],
    "seed": [3, None],
    "stop": [None, []],
    "stream": [False, None],
    "stream_options": [None, {}, {"include_usage": True}, {"include_obfuscation": False}],
    "service_tier": ["auto", "default", None],
    "top_p": [1, None],
    "top_k": [0, -1, None],
    "repetition_penalty": [1, None],
}
NEUTRAL_COMPLETION = {
    "best_of": [1, None],
    "suffix": [None],
    "echo": [False, None],
    "logprobs": [None],
}
NEUTRAL_CHAT = {
    "response_format": [{"type": "text"}, None],
    "tools": [[], None],
    "tool_choice": ["none", "auto", None],
    "parallel_tool_calls": [True, False, None],
    "functions": [[], None],
    "function_call": ["none", None],
    "modalities": [["text"], None],
    "logprobs": [False, None],
    "top_logprobs": [None, 0],
    "audio": [None],
    "reasoning_effort": [None],
}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
CASES = [
    *[(COMPLETIONS, name, v) for name, vs in (NEUTRAL | NEUTRAL_COMPLETION).items() for v in vs],
    *[(CHATS, name, v) for name, vs in (NEUTRAL | NEUTRAL_CHAT).items() for v in vs],
]


def said(answer: dict) -> list:
    return [{**choice, "logprobs": None} for choice in answer["choices"]]


def test_neutral_fields_change_nothing(client):
    plain = {path: client.post(path, json=body).json() for path, body in BODIES.items()}
    for path, name, value in CASES:
        response = client.post(path, json=BODIES[path] | {name: value})
        assert response.status_code == 200, (path, name, value, response.text)
        assert said(response.json()) == said(plain[path]), (path, name, value)
        assert response.json()["usage"] == plain[path]["usage"]


BODIES = {COMPLETIONS: COMPLETION, CHATS: CHAT}


def test_a_temperature_of_null_is_the_default(client):
    def sampled(**more):
        body = {**COMPLETION, "max_tokens": 40, "seed": 5, **more}
        return client.post(COMPLETIONS, json=body).json()["choices"][0]["text"]

    assert sampled(temperature=None) == sampled(temperature=1) != sampled(temperature=0)


REFUSED = [
    (COMPLETIONS, "logit_bias", {"50": 3}, "only null or {} is accepted"),
    (COMPLETIONS, "best_of", 3, "only null or the value of n"),
    (COMPLETIONS, "suffix", "end", "only null is accepted"),
    (COMPLETIONS, "service_tier", "best", "only one of auto, default"),
    (COMPLETIONS, "frequency_penalty", 2.5, "less than or equal to 2"),
    (COMPLETIONS, "presence_penalty", -2.5, "greater than or equal to -2"),
    (COMPLETIONS, "top_k", -2, "greater than or equal to -1"),
    (COMPLETIONS, "n", 0, "greater than or equal to 1"),
    (COMPLETIONS, "n", 129, "less than or equal to 128"),
    (COMPLETIONS, "prompt", {}, "a text of up to 65536 characters, a list of token ids"),
    (COMPLETIONS, "prompt", ["a", 1], "a list of token ids"),
    (COMPLETIONS, "prompt", [["a"]], "a list of token ids"),
    (COMPLETIONS, "prompt", [[]], "a list of token ids"),
    (COMPLETIONS, "prompt", ["a"] * 2049, "up to 2048"),
    (COMPLETIONS, "prompt", ["x"] * 65, "65 texts were asked for, prompts times n; this server"),
    (COMPLETIONS, "stop", [1], "a text of 1 to 64 characters"),
    (COMPLETIONS, "metadata", {"a": 1}, "at most 16 texts by name"),
    (COMPLETIONS, "tools", [], "there is no such field"),
    (CHATS, "tools", [{"type": "function"}], "only null or [] is accepted"),
    (CHATS, "tool_choice", "required", "only null, none or auto is accepted"),
    (CHATS, "response_format", {"type": "json_object"}, 'only null or {"type": "text"}'),
    (CHATS, "modalities", ["text", "audio"], 'only null or ["text"]'),
    (CHATS, "reasoning_effort", "low", "only null is accepted"),
    (CHATS, "audio", {"voice": "x"}, "only null is accepted"),
    (CHATS, "top_logprobs", 3, "needs logprobs true"),
    (CHATS, "suffix", None, "there is no such field"),
]


@pytest.mark.parametrize(("path", "name", "value", "reason"), REFUSED)
def test_what_is_not_served_is_refused_by_name(client, path, name, value, reason):
    response = client.post(path, json=BODIES[path] | {name: value})
    error = response.json()["error"]
    assert response.status_code == 400
    assert reason in error["message"]
    assert name in (error["param"], error["message"].split(" ")[0].strip(":")) or "texts" in reason
    assert "\n" not in error["message"]


INTERNALS = re.compile(
    r"constrained|\w\[\w|function-|nullable|union|tagged|Value error|pydantic|a valid dict"
)


def test_no_message_tells_how_the_server_is_made(client):
    wrong = [{}, {"a": 1}, [], [[]], [{}], "x" * 600_000, -1, 1.5, 10**12, True, "low", [["x"]]]
    fields = sorted({name for _, name, _ in CASES} | {"model", "prompt", "messages", "max_tokens"})
    n_refused = 0
    for path in (COMPLETIONS, CHATS):
        for name in fields:
            for value in wrong:
                response = client.post(path, json=BODIES[path] | {name: value})
                assert response.status_code < 500
                if response.status_code == 400:
                    n_refused += 1
                    found = response.json()["error"]
                    assert not INTERNALS.search(found["message"]), (name, value, found)
                    assert not INTERNALS.search(found["param"] or ""), (name, value, found)
    assert n_refused > 400


# Messages


def chat(client, messages, **more):
    return client.post(CHATS, json=CHAT | {"messages": messages} | more)


def test_an_answer_can_be_sent_back_as_it_came(client):
    first = chat(client, CHAT["messages"]).json()["choices"][0]["message"]
    assert first["refusal"] is None
    plain = {"role": "assistant", "content": first["content"]}
    more = [{"role": "user", "content": "And?"}]
    expected = chat(client, [*CHAT["messages"], plain, *more]).json()
    nothing = dict.fromkeys(("annotations", "audio", "function_call", "tool_calls", "name"))
    for again in (first, {**first, **nothing}, {**first, "name": "tiny", "tool_calls": []}):
        found = chat(client, [*CHAT["messages"], again, *more])
        assert found.status_code == 200, found.text
        assert found.json()["choices"] == expected["choices"]
        assert found.json()["usage"] == expected["usage"]


def test_text_parts_are_one_text(client):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    found, expected = (
        chat(client, [{"role": "user", "content": content}]).json() for content in (parts, "Hello")
    )
    assert (found["choices"], found["usage"]) == (expected["choices"], expected["usage"])


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "user", "content": None}, "content is needed"),
        ({"role": "user"}, "content is needed"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "a text or a list"),
        ({"role": "user", "content": 5}, "a text or a list of parts"),
        ({"role": "poet", "content": "x"}, "a role is one of system, developer, user"),
        ({"role": "assistant", "refusal": "no"}, "only null is accepted"),
        ({"role": "assistant", "tool_calls": [{"id": "x"}]}, "only null or [] is accepted"),
        ({"role": "user", "content": "x" * 65_537}, "65536 characters"),
    ],
)
def test_a_message_that_cannot_be_written_is_refused(client, message, reason):
    response = chat(client, [message])
    error = response.json()["error"]
    assert response.status_code == 400
    assert reason in error["message"]
    assert error["param"].startswith("messages.0")
    assert not INTERNALS.search(error["message"])


def test_an_assistant_may_have_said_nothing(client):
    nothing = {"role": "assistant", "content": None}
    turns = [*CHAT["messages"], nothing, {"role": "user", "content": "Well?"}]
    said_empty = [*CHAT["messages"], {**nothing, "content": ""}, turns[-1]]
    assert chat(client, turns).json()["usage"] == chat(client, said_empty).json()["usage"]
    assert chat(client, turns).status_code == 200


TURNS = [{"role": "developer", "content": "Be kind"}, {"role": "user", "content": "Hi"}]
LOOP = "{% for m in messages %}BODY{{ m.role }}={{ m.content }};{% endfor %}"
REFUSES = LOOP.replace(
    "BODY",
    "{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no') }}{% endif %}",
)
DROPS = "{% for m in messages %}{% if m.role in ['system', 'user'] %}{{ m.role }}={{ m.content }};{% endif %}{% endfor %}"  # noqa: E501


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (LOOP.replace("BODY", ""), "developer=Be kind;user=Hi;"),
        (REFUSES, "system=Be kind;user=Hi;"),
        (DROPS, "system=Be kind;user=Hi;"),
    ],
)
def test_a_developer_is_the_system_where_the_template_knows_none(
    client, monkeypatch, template, written
):
    tokenizer = client.app.app.state.service.loaded.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert chat(client, TURNS).json()["usage"]["prompt_tokens"] == len(written)
    plain = client.post(COMPLETIONS, json=COMPLETION | {"prompt": written}).json()
    message = chat(client, TURNS).json()["choices"][0]["message"]
    assert message["content"] == plain["choices"][0]["text"]


def test_a_tools_answer_is_written_or_refused_but_never_lost(client, monkeypatch):
    tokenizer = client.app.app.state.service.loaded.tokenizer
    turns = [*CHAT["messages"], {"role": "tool", "content": "42", "tool_call_id": "c1"}]
    monkeypatch.setattr(tokenizer, "chat_template", LOOP.replace("BODY", ""))
    assert chat(client, turns).json()["usage"]["prompt_tokens"] == len("user=Hi;tool=42;")
    monkeypatch.setattr(tokenizer, "chat_template", DROPS)
    lost = chat(client, turns)
    assert lost.status_code == 400
    assert "no place for a message of role tool" in lost.json()["error"]["message"]
    monkeypatch.setattr(tokenizer, "chat_template", REFUSES)
    assert chat(client, turns).status_code == 400
