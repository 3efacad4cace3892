"""The pages without a browser: what they hold, what they refuse, what they never let through."""

import json
import random
import re
from html.parser import HTMLParser

import pytest

PAGES = ["/", "/restaurant", "/super-weights", "/runs"]
NASTY = "<img src=x onerror=alert(1)> \"'&amp;</script>"
FORM = {
    **{"max_tokens": "12", "seed": "5", "temperature": "0.7", "top_p": "1"},
    **{"repetition_penalty": "1", "model": "tiny", "beside": ""},
}


class Page(HTMLParser):
    """What a page is made of."""

    VOID = frozenset(("meta", "link", "input", "img", "br"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == [], "tags that are not closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def look(client, path, status=200, **form) -> Page:
    """Get a page, or post a form to it; every page keeps the rules."""
    headers = {"accept": "text/html"}
    response = (
        client.post(path, data=form, headers=headers) if form else client.get(path, headers=headers)
    )
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "unsafe" not in response.headers["content-security-policy"]
    assert response.headers["cache-control"] == "no-store"
    page = Page(response.text)
    check_rules(page)
    return page


def check_rules(page: Page) -> None:
    """Nothing inline, no id twice, every control has a label, one main heading."""
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") or name == "style" for name in attrs), (tag, attrs)
        assert tag != "style"
        for name in ("for", "aria-labelledby", "aria-describedby", "list"):
            assert set((attrs.get(name) or "").split()) <= set(ids), (tag, attrs)
    labelled = {attrs.get("for") for attrs in page.all("label")}
    for attrs in [*page.all("input"), *page.all("select"), *page.all("textarea")]:
        assert attrs.get("id") in labelled or attrs.get("type") == "hidden"
    assert all("src" in attrs for attrs in page.all("script"))
    assert all("alt" in attrs for attrs in page.all("img"))
    assert len(page.all("h1")) == 1
    assert page.all("html") == [{"lang": "en"}]


@pytest.mark.parametrize("path", PAGES)
def test_every_page_stands_without_runs(make, browse, tmp_path, path):
    for folder in (tmp_path, tmp_path / "not there"):
        with browse(make(runs=folder)) as client:
            page = look(client, path)
            assert "tiny" in page.text
            assert client.head(path).status_code == 200


def test_empty_pages_say_which_command_fills_them(make, browse, tmp_path):
    with browse(make(runs=tmp_path)) as client:
        assert "swlora train --model tiny" in look(client, "/").text
        assert "swlora identify --model tiny" in look(client, "/super-weights").text
        assert "swlora compare" in look(client, "/runs").text
        assert "--dataset" in look(client, "/restaurant").text


@pytest.mark.parametrize("path", [*PAGES, "/runs/found", "/runs/second.run", "/runs/study/first"])
def test_every_page_stands_with_runs(client, path):
    look(client, path)


def test_what_is_offered_can_be_picked(client):
    options = [attrs["value"] for attrs in look(client, "/").all("option") if "value" in attrs]
    assert {"tiny", "second.run", "study/first"} <= set(options)
    chosen = look(client, "/?model=study/first")
    assert "study/first" in [
        a["value"] for a in chosen.all("option") if "selected" in a and "value" in a
    ]
    look(client, "/?model=" + "nosuch")


# Without JavaScript


def api_text(client, prompt="Hello", **more) -> str:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "seed": 5, "temperature": 0.7}
    answer = client.post("/v1/completions", json=body | more)
    return answer.json()["choices"][0]["text"]


def test_a_form_that_is_sent_comes_back_with_the_text(client):
    page = look(client, "/", prompt="Hello", **FORM)
    assert api_text(client) in page.text
    assert "12 tokens" in page.text and "tokens/s" in page.text
    assert "that of the last text is 5" in page.text
    (prompt,) = page.all("textarea")
    assert prompt["name"] == "prompt"


def test_two_models_write_beside_each_other(client):
    form = FORM | {"beside": "study/first"}
    page = look(client, "/", prompt="Hello", **form)
    assert api_text(client) in page.text
    assert api_text(client, model="study/first") in page.text
    assert api_text(client) != api_text(client, model="study/first")


def test_a_chat_is_written_by_the_template(client):
    page = look(client, "/", prompt="Hello", mode="chat", **FORM)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12}
    answer = client.post("/v1/chat/completions", json=body | {"seed": 5, "temperature": 0.7})
    assert answer.json()["choices"][0]["message"]["content"].lstrip() in page.text


def test_a_line_break_is_what_it_was_in_the_field(client):
    assert api_text(client, "one\ntwo") != api_text(client, "one\r\ntwo")
    page = look(client, "/", prompt="one\r\ntwo", **FORM)
    assert api_text(client, "one\ntwo") in page.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": "  "}, "write something"),
        ({"max_tokens": "many"}, "the length must be a whole number"),
        ({"max_tokens": "1.5"}, "the length must be a whole number"),
        ({"max_tokens": "401"}, "at most 400"),
        ({"max_tokens": "0"}, "max_tokens"),
        ({"temperature": "hot"}, "surprise must be a number"),
        ({"temperature": "nan"}, "temperature"),
        ({"temperature": "2.1"}, "temperature"),
        ({"seed": "9" * 30}, "seed"),
        ({"prompt": "x" * 600}, "context"),
    ],
)
def test_what_is_refused_is_said_beside_the_form(client, change, said):
    form = {"prompt": "Hello " + NASTY} | FORM | change
    page = look(client, "/", 400, **form)
    assert said in page.text
    assert form["prompt"] in page.text  # nothing that was filled in is lost
    assert "open" in page.all("details")[0]


def test_a_model_that_is_not_there_is_refused(client):
    page = look(client, "/", 404, **(FORM | {"prompt": "Hi", "model": "../../etc"}))
    assert "no such model" in page.text


def test_a_full_queue_is_said_on_the_page(make, browse, monkeypatch):
    from swlora.web.scheduler import Scheduler
    from swlora.web.tickets import QueueFullError

    def full(*_arguments):
        raise QueueFullError(7)

    with browse(make()) as client:
        monkeypatch.setattr(Scheduler, "submit", full)
        response = client.post("/", data={"prompt": "Hi"} | FORM)
        assert (response.status_code, response.headers["retry-after"]) == (429, "7")
        assert "busy" in Page(response.text).text


def test_a_page_takes_forms_only(client):
    response = client.post("/", json={"prompt": "Hi"})
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_type"


def test_a_weight_that_is_switched_off_changes_one_text_only(client):
    form = {"prompt": "Hello", "zeroed": "1:mlp.down_proj:7:11", **FORM}
    page = look(client, "/super-weights", **form)
    side = {"model": "tiny", "zeroed": ["1:mlp.down_proj:7:11"]}
    body = {"prompt": "Hello", "max_tokens": 12, "seed": 5, "temperature": 0.7, "sides": [side]}
    events = client.post("/api/generate", json=body).text.split("\n\n")
    parts = [json.loads(e[6:]).get("text", "") for e in events if e.startswith("data: ")]
    broken = "".join(parts)
    assert broken != api_text(client)
    assert broken in page.text and api_text(client) in page.text
    switches = [a for a in page.all("input") if a.get("role") == "switch"]
    assert [("checked" in a) for a in switches] == [True]
    none_off = look(client, "/super-weights", prompt="Hello", **FORM)
    assert none_off.text.count("12 tokens") == 1


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
    names = ["prompt", "mode", "zeroed", "field.name", "field.", "x" * 200, "\x00", *FORM]
    values = ["", " ", "0", "-1", "1e9", "nan", NASTY, "é" * 99, "\x00", "\u202e", "tiny", "chat"]
    for _ in range(150):
        form = {"max_tokens": "2", "prompt": "Hi", "model": "tiny", "beside": ""}
        form |= {pick.choice(names): pick.choice(values) for _ in range(pick.randint(1, 4))}
        path = pick.choice(["/", "/restaurant", "/super-weights", "/super-weights?run=" + "x"])
        response = client.post(path, data=form)
        assert response.status_code in (200, 400, 404), (path, form, response.text[:300])
        check_rules(Page(response.text))
    for content in (b"%", b"&&==;", b"prompt=%ff%fe", b"a=b" * 5000, b"=", b"&" * 5000):
        headers = {"content-type": "application/x-www-form-urlencoded"}
        assert client.post("/", content=content, headers=headers).status_code < 500


# What is escaped


def test_nothing_that_was_typed_becomes_markup(client):
    page = look(client, "/", **(FORM | {"prompt": NASTY}))
    assert NASTY in page.text
    assert not [a for a in page.all("img") if "onerror" in a]


def test_what_the_model_says_is_text(client, monkeypatch):
    tokenizer = client.app.app.state.service.loaded.tokenizer
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **_: NASTY * len(ids))
    page = look(client, "/", prompt="Hello", **FORM)
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


# Files


def luminance(colour: str) -> float:
    """The relative luminance of #rrggbb, as WCAG 2 defines it."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


TEXT_ON = [
    *[(ink, back) for ink in ("ink", "muted", "accent") for back in ("back", "raised")],
    *[("on-accent", "accent"), ("good", "good-back"), ("bad", "bad-back"), ("busy", "busy-back")],
    *[("ink", "plain-back"), ("muted", "plain-back"), ("bad", "raised")],
]
DRAWN_ON = [
    *[(line, "back") for line in ("faint", "second", "accent", "control-edge")],
    *[("control-edge", "raised"), ("accent", "raised")],
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrasts_reach_aa(scheme):
    from swlora.web.pages.static import assets

    sheet = assets()["style.css"].content.decode()
    light, dark = (dict(re.findall(r"--([a-z-]+): (#\w{6});", part)) for part in tokens(sheet))
    colours = light if scheme == "light" else light | dark
    assert len(light) == len(dark) > 15
    for pairs, least in ((TEXT_ON, 4.5), (DRAWN_ON, 3.0)):
        for front, back in pairs:
            high, low = sorted((luminance(colours[front]), luminance(colours[back])))[::-1]
            assert (high + 0.05) / (low + 0.05) >= least, (front, back)


def tokens(sheet: str) -> list[str]:
    """The two blocks of colours, for light and for dark."""
    return re.findall(r":root \{(.*?)\}", sheet, re.S)


def test_files_are_served_by_name_and_version(client):
    page = look(client, "/")
    (sheet,) = [a["href"] for a in page.all("link") if a["rel"] == "stylesheet"]
    (script,) = [a["src"] for a in page.all("script")]
    for url, kind in ((sheet, "text/css"), (script, "text/javascript")):
        response = client.get(url)
        assert response.headers["content-type"].startswith(kind)
        assert "immutable" in response.headers["cache-control"]
        again = client.get(url.partition("?")[0])
        assert (again.content, again.headers["cache-control"]) == (response.content, "no-cache")
        tag = {"if-none-match": again.headers["etag"]}
        assert client.get(url, headers=tag).status_code == 304
    imported = re.findall(r'from "\./([a-z]+\.js)"', client.get(script).text)
    assert len(imported) == 3
    assert all(client.get(f"/static/{name}").status_code == 200 for name in imported)


@pytest.mark.parametrize(
    "name", ["../app.py", "%2e%2e/app.py", "", "/etc/passwd", "style.css/", "STYLE.CSS", "."]
)
def test_no_other_file_is_served(client, name):
    assert client.get("/static/" + name).status_code == 404


def test_a_page_loads_nothing_from_elsewhere(client):
    for path in PAGES:
        text = client.get(path).text
        assert not re.search(r"""(src|href|action)=["'](https?:)?//""", text)
    from swlora.web.pages.static import assets

    for name, asset in assets().items():
        found = set(re.findall(rb"https?://[^\"' )]+", asset.content))
        assert found <= {b"http://www.w3.org/2000/svg"}, name
