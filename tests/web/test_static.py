"""Style sheet and scripts: served by name and version, readable, loading nothing from elsewhere."""

import re

import pytest
from tests.support.page_reading import PAGES, look


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
    assert len(imported) == 4
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
