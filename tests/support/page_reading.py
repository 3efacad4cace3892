"""Pages as a program reads them: what they are made of, and the rules that all of them keep."""

from html.parser import HTMLParser

PAGES = ["/", "/write", "/chat", "/restaurant", "/super-weights", "/runs"]
NASTY = "<img src=x onerror=alert(1)> \"'&amp;</script>"
FORM = {
    **{"max_tokens": "12", "seed": "5", "temperature": "0.7", "top_p": "1"},
    **{"repetition_penalty": "1", "model": "tiny", "compare": ""},
}

FORMATS = ("/write", "/chat", "/restaurant")


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


def api_text(client, prompt="Hello", **more) -> str:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "seed": 5, "temperature": 0.7}
    answer = client.post("/v1/completions", json=body | more)
    return answer.json()["choices"][0]["text"]


def formats(page: Page) -> list[str | None]:
    """The formats that a page offers."""
    return [attrs["href"] for attrs in page.all("a") if attrs.get("href") in FORMATS]


def boxes(page: Page) -> list[dict[str, str | None]]:
    """The ticks that set weights to zero."""
    return [attrs for attrs in page.all("input") if attrs.get("type") == "checkbox"]


def panes_shown(page: Page) -> list[bool]:
    """Whether each pane is there for a person."""
    return ["hidden" not in attrs for attrs in page.all("section") if "data-pane" in attrs]
