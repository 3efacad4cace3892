"""The pages without a browser: what they hold, what they refuse, what they never let through."""

import json
import random

import pytest
from tests.support.page_reading import (
    FORM,
    NASTY,
    PAGES,
    Page,
    api_text,
    boxes,
    check_rules,
    look,
    panes_shown,
)


@pytest.mark.parametrize("path", PAGES)
def test_every_page_stands_without_runs(make, browse, tmp_path, path):
    for folder in (tmp_path, tmp_path / "not there"):
        with browse(make(runs=folder)) as client:
            page = look(client, path)
            assert "tiny" in page.text
            assert client.head(path).status_code == 200


def test_empty_pages_say_which_command_fills_them(make, browse, tmp_path):
    with browse(make(runs=tmp_path)) as client:
        assert "swlora train --model tiny" in look(client, "/write").text
        assert "swlora identify --model tiny" in look(client, "/super-weights").text
        assert "swlora compare" in look(client, "/runs").text
        assert "--dataset" in look(client, "/restaurant").text


@pytest.mark.parametrize("path", [*PAGES, "/runs/found", "/runs/second.run", "/runs/study/first"])
def test_every_page_stands_with_runs(client, path):
    look(client, path)


def test_what_is_offered_can_be_picked(client):
    options = [attrs["value"] for attrs in look(client, "/write").all("option") if "value" in attrs]
    assert {"tiny", "second.run", "study/first"} <= set(options)
    chosen = look(client, "/write?model=study/first")
    assert "study/first" in [
        a["value"] for a in chosen.all("option") if "selected" in a and "value" in a
    ]
    look(client, "/write?model=" + "nosuch")


# Without JavaScript


def test_a_form_that_is_sent_comes_back_with_the_text(client):
    page = look(client, "/write", prompt="Hello", **FORM)
    assert api_text(client) in page.text
    assert "12 tokens" in page.text and "tokens/s" in page.text
    assert "the last one was 5" in page.text
    (prompt,) = page.all("textarea")
    assert prompt["name"] == "prompt"


def test_two_models_write_beside_each_other(client):
    form = FORM | {"compare": "study/first"}
    page = look(client, "/write", prompt="Hello", **form)
    assert api_text(client) in page.text
    assert api_text(client, model="study/first") in page.text
    assert api_text(client) != api_text(client, model="study/first")


def test_a_line_break_is_what_it_was_in_the_field(client):
    assert api_text(client, "one\ntwo") != api_text(client, "one\r\ntwo")
    page = look(client, "/write", prompt="one\r\ntwo", **FORM)
    assert api_text(client, "one\ntwo") in page.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": "  "}, "write a prompt"),
        ({"max_tokens": "many"}, "max tokens must be a whole number"),
        ({"max_tokens": "1.5"}, "max tokens must be a whole number"),
        ({"max_tokens": "401"}, "at most 400"),
        ({"max_tokens": "0"}, "max_tokens"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"temperature": "nan"}, "temperature"),
        ({"temperature": "2.1"}, "temperature"),
        ({"seed": "9" * 30}, "seed"),
        ({"prompt": "x" * 600}, "context"),
    ],
)
def test_what_is_refused_is_said_beside_the_form(client, change, said):
    form = {"prompt": "Hello " + NASTY} | FORM | change
    page = look(client, "/write", 400, **form)
    assert said in page.text
    assert form["prompt"] in page.text  # nothing that was filled in is lost
    assert "open" in page.all("details")[0]


def test_a_model_that_is_not_there_is_refused(client):
    page = look(client, "/write", 404, **(FORM | {"prompt": "Hi", "model": "../../etc"}))
    assert "no such model" in page.text


def test_a_full_queue_is_said_on_the_page(make, browse, monkeypatch):
    from swlora.web.scheduler import Scheduler
    from swlora.web.tickets import QueueFullError

    def full(*_arguments):
        raise QueueFullError(7)

    with browse(make()) as client:
        monkeypatch.setattr(Scheduler, "submit", full)
        response = client.post("/write", data={"prompt": "Hi"} | FORM)
        assert (response.status_code, response.headers["retry-after"]) == (429, "7")
        assert "busy" in Page(response.text).text


def test_a_page_takes_forms_only(client):
    response = client.post("/write", json={"prompt": "Hi"})
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_type"


def test_a_weight_at_zero_changes_one_text_only(client):
    form = {"prompt": "Hello", "zeroed": "1:mlp.down_proj:7:11", **FORM}
    page = look(client, "/super-weights", **form)
    side = {"model": "tiny", "zeroed": ["1:mlp.down_proj:7:11"]}
    body = {"prompt": "Hello", "max_tokens": 12, "seed": 5, "temperature": 0.7, "sides": [side]}
    events = client.post("/api/generate", json=body).text.split("\n\n")
    parts = [json.loads(e[6:]).get("text", "") for e in events if e.startswith("data: ")]
    broken = "".join(parts)
    assert broken != api_text(client)
    assert broken in page.text and api_text(client) in page.text
    assert [("checked" in a) for a in boxes(page)] == [True]
    assert panes_shown(page) == [True, True]
    none_off = look(client, "/super-weights", prompt="Hello", **FORM)
    assert none_off.text.count("12 tokens") == 1
    assert panes_shown(none_off) == [True, False]  # none that would wait for ever


def test_super_weights_open_with_the_best_proved_one_at_zero(client):
    page = look(client, "/super-weights")
    assert [("checked" in a, a["value"]) for a in boxes(page)] == [(True, "1:mlp.down_proj:7:11")]
    assert panes_shown(page) == [True, True]
    assert "Set to zero" in page.text and "ticked weights at zero" in page.text


def test_a_weight_that_is_not_offered_is_refused(client):
    look(client, "/super-weights", 400, prompt="Hello", zeroed="0:mlp.down_proj:0:0", **FORM)


def test_a_restaurant_becomes_a_prompt(client):
    form = {"field.area": "riverside", "field.name": "Aromi", **FORM}
    page = look(client, "/restaurant", **form)
    meaning = "name[Aromi], area[riverside]"
    assert meaning in page.text
    assert api_text(client, meaning).lstrip() in page.text
    assert "riverside" in [o.get("value", "") for o in page.all("option")] or any(
        "selected" in o for o in page.all("option")
    )
    look(client, "/restaurant", 400, **{"field.name": "a] area[b", **FORM})
    look(client, "/restaurant", 400, **{"field.stars": "5", **FORM})


def test_the_datas_restaurants_can_be_looked_at_one_after_the_other(client):
    from dataclasses import replace

    from swlora.data.examples import Example
    from swlora.web.restaurant import References

    rows = [("name[Aromi], food[Thai]", "Thai food at Aromi."), ("name[Zizzi]", "It is Zizzi.")]
    app = client.app.app
    references = References([Example(mr, text) for mr, text in rows])
    app.state.service = replace(app.state.service, references=references)
    assert "Thai food at Aromi." in look(client, "/restaurant").text
    assert "It is Zizzi." in look(client, "/restaurant?example=1").text
    assert "Thai food at Aromi." in look(client, "/restaurant?example=2").text
    unknown = look(client, "/restaurant", **{"field.name": "Nowhere", **FORM})
    assert "no restaurant with exactly these facts" in unknown.text


def test_strange_forms_never_break_a_page(client):
    pick = random.Random(1)
    names = [
        "prompt",
        "history",
        "action",
        "zeroed",
        "field.name",
        "field.",
        "x" * 200,
        "\x00",
        *FORM,
    ]
    values = ["", " ", "0", "-1", "1e9", "nan", NASTY, "é" * 99, "\x00", "\u202e", "tiny", "chat"]
    for _ in range(150):
        form = {"max_tokens": "2", "prompt": "Hi", "model": "tiny", "compare": ""}
        form |= {pick.choice(names): pick.choice(values) for _ in range(pick.randint(1, 4))}
        path = pick.choice(["/write", "/chat", "/restaurant", "/super-weights?run=" + "x"])
        response = client.post(path, data=form)
        assert response.status_code in (200, 400, 404), (path, form, response.text[:300])
        check_rules(Page(response.text))
    for content in (b"%", b"&&==;", b"prompt=%ff%fe", b"a=b" * 5000, b"=", b"&" * 5000):
        headers = {"content-type": "application/x-www-form-urlencoded"}
        assert client.post("/write", content=content, headers=headers).status_code < 500


# What is escaped


def test_nothing_that_was_typed_becomes_markup(client):
    page = look(client, "/write", **(FORM | {"prompt": NASTY}))
    assert NASTY in page.text
    assert not [a for a in page.all("img") if "onerror" in a]


def test_what_the_model_says_is_text(client, monkeypatch):
    tokenizer = client.app.app.state.service.loaded.tokenizer
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **_: NASTY * len(ids))
    page = look(client, "/write", prompt="Hello", **FORM)
    assert NASTY in page.text


def test_problems_are_told_to_people_in_pages_and_to_programs_in_json(client):
    page = look(client, "/runs/" + "%3Cb%3E", 404)
    assert "no such run" in page.text
    look(client, "/nowhere", 404)
    look(client, "/studies/x", 404)
    look(client, "/runs?seen=" + "x" * 50, 400)
    for path in ("/runs/x", "/nowhere", "/studies/x"):
        assert client.get(path).json()["error"]["message"]
    accept = {"accept": "text/html"}
    for path in ("/v1/models/x", "/api/run?name=x", "/static/x.js"):
        assert client.get(path, headers=accept).json()["error"]["message"]
