"""The chat without JavaScript, and which format a model opens in."""

import json
import shutil

import pytest
from tests.support.page_reading import FORM, FORMATS, NASTY, formats, look, panes_shown

CHAT = FORM | {"action": "send", "system": ""}


@pytest.fixture
def own_client(make, browse, runs, tmp_path, monkeypatch):
    """A client whose runs a test may change."""
    monkeypatch.setattr("swlora.web.folders.FRESH_S", 0.0)
    with browse(make(runs=shutil.copytree(runs, tmp_path / "runs"))) as client:
        yield client


def api_answer(client, *said: str, model="tiny", system="") -> str:
    """What the API answers to a chat in which both sides spoke in turns."""
    roles = ("user", "assistant") * len(said)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    body = {"model": model, "messages": messages, "max_tokens": 12, "seed": 5, "temperature": 0.7}
    answer = client.post("/v1/chat/completions", json=body).json()
    return answer["choices"][0]["message"]["content"].lstrip()


def history(page) -> list[dict]:
    """The turns that a page carries."""
    (field,) = [attrs for attrs in page.all("input") if attrs.get("name") == "history"]
    return json.loads(field["value"])


def test_every_turn_is_answered_with_all_turns_before_it(client):
    page = look(client, "/chat", message="Hello", **CHAT)
    first = api_answer(client, "Hello")
    assert history(page) == [{"user": "Hello", "answers": [first]}]
    again = CHAT | {"history": json.dumps(history(page)), "message": "And then?\n"}
    page = look(client, "/chat", **again)
    second = api_answer(client, "Hello", first, "And then?")
    assert second != api_answer(client, "And then?")
    assert history(page)[1:] == [{"user": "And then?", "answers": [second]}]
    assert first in page.text and second in page.text and "12 tokens" in page.text
    assert panes_shown(page) == [True, False]


def test_the_system_prompt_comes_first(client):
    system = "Be brief."
    page = look(client, "/chat", message="Hello", **CHAT | {"system": system})
    answer = api_answer(client, "Hello", system=system)
    assert history(page)[0]["answers"] == [answer] != [api_answer(client, "Hello")]
    assert system in page.text


def test_models_that_are_compared_have_a_chat_of_their_own_each(client):
    turns = [{"user": "Hello", "answers": ["Good day", "Yo"]}]
    form = CHAT | {"compare": "study/first", "history": json.dumps(turns), "message": "So?"}
    page = look(client, "/chat", **form)
    expected = [
        api_answer(client, "Hello", "Good day", "So?"),
        api_answer(client, "Hello", "Yo", "So?", model="study/first"),
    ]
    assert history(page)[1]["answers"] == expected
    assert panes_shown(page) == [True, True]
    turns = [{"user": "Hello", "answers": ["Good day"]}]  # it joins now
    page = look(client, "/chat", **form | {"history": json.dumps(turns)})
    joined = api_answer(client, "Hello", "Good day", "So?", model="study/first")
    assert history(page)[1]["answers"] == [expected[0], joined]


def test_regenerate_answers_the_last_message_anew_and_reset_forgets_all(client):
    turns = [{"user": "Hello", "answers": ["Good day"]}, {"user": "So?", "answers": ["wrong"]}]
    form = CHAT | {"history": json.dumps(turns), "message": "half typed"}
    page = look(client, "/chat", **form | {"action": "regenerate"})
    answer = api_answer(client, "Hello", "Good day", "So?")
    assert history(page) == [turns[0], {"user": "So?", "answers": [answer]}]
    assert "half typed" in page.text
    page = look(client, "/chat", **form | {"action": "reset"})
    assert history(page) == []
    look(client, "/chat", 400, **CHAT | {"action": "regenerate", "message": ""})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"message": "  "}, "write a message"),
        ({"message": "x" * 600}, "context"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"history": "[{]"}, "cannot be read"),
        ({"history": '[{"user": "a", "answers": []}]'}, "cannot be read"),
        ({"history": '[{"user": "\\ud800", "answers": ["a"]}]'}, "cannot be read"),
        ({"history": json.dumps([{"user": "a", "answers": ["b"]}] * 121)}, "cannot be read"),
    ],
)
def test_what_is_refused_is_said_and_nothing_typed_is_lost(client, change, said):
    form = CHAT | {"message": "Hello " + NASTY} | change
    page = look(client, "/chat", 400, **form)
    assert said in page.text and form["message"] in page.text


def test_what_was_said_is_text(client):
    turns = [{"user": NASTY, "answers": [NASTY]}]
    page = look(client, "/chat", **CHAT | {"history": json.dumps(turns), "message": NASTY})
    assert page.text.count(NASTY) >= 3
    assert not page.all("img")[1:]  # but for the page's own


def test_an_instruct_model_opens_in_a_chat_and_an_adapter_in_the_format_of_its_rows(
    own_client, tmp_path, monkeypatch
):
    def opens(path: str = "/") -> str:
        links = look(own_client, path).all("a")
        (here,) = [a["href"] for a in links if a.get("href") in FORMATS and "aria-current" in a]
        return here

    def note(**facts: object) -> None:
        (tmp_path / "runs/second.run/adapter/swlora.json").write_text(json.dumps(facts))

    assert opens() == opens("/?model=tiny") == "/chat"
    assert opens("/?model=second.run") == "/write"  # of E2E data: a separator follows the prompt
    note(separator="", is_chat=True)
    assert opens("/?model=second.run") == "/chat"
    note(separator="", is_chat=False)
    assert opens("/?model=second.run") == "/write"
    monkeypatch.setattr(own_client.app.app.state.service.loaded.tokenizer, "chat_template", None)
    assert opens() == "/write"
    look(own_client, "/chat", 404)


def test_restaurants_are_a_format_where_there_are_such_data(client, make, browse, tmp_path):
    assert formats(look(client, "/write")) == list(FORMATS)
    with browse(make(runs=tmp_path)) as bare:
        assert formats(look(bare, "/write")) == ["/write", "/chat"]
        look(bare, "/restaurant")  # as before, for who kept the address


def test_an_adapter_that_cannot_be_served_is_named_with_the_reason(own_client, tmp_path):
    path = tmp_path / "runs/second.run/adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "IA3"}))
    (reason,) = [one["reason"] for one in own_client.get("/api/models").json()["not_served"]]
    for page in ("/write", "/chat", "/restaurant", "/runs/second.run"):
        found = look(own_client, page)
        assert reason in found.text and "second.run" in found.text
        assert "second.run" not in [attrs.get("value") for attrs in found.all("option")]
    assert "cannot be served" not in look(own_client, "/runs/study/first").text
