"""A person writes: texts stream, stop, stand side by side; forms and switches do what they say."""

import re
import urllib.request

import pytest
from playwright.sync_api import Page, expect

pytestmark = [pytest.mark.browser, pytest.mark.allow_hosts(["127.0.0.1"])]


def settings(page: Page, **values: object) -> None:
    """Fill in settings."""
    page.locator("summary", has_text="Settings").click()
    for name, value in values.items():
        page.locator(f"#{name}").fill(str(value))


def pane(page: Page, number: int = 0):
    return page.locator("[data-pane]").nth(number)


def written(page: Page, number: int = 0):
    return pane(page, number).locator("[data-written]")


def write(page: Page) -> None:
    """Press the button and wait for the end."""
    page.locator("[data-submit]").click()
    expect(page.locator("[data-submit]")).to_be_disabled()
    expect(page.locator("[data-submit]")).to_be_enabled()


def metric(server: str, name: str) -> float:
    with urllib.request.urlopen(server + "/metrics") as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_a_prompt_streams(visit):
    page = visit("/write")
    page.get_by_label("Compare with").select_option("")
    settings(page, max_tokens=1500, seed=7)
    page.get_by_label("Prompt").fill("Once")
    page.evaluate("() => { window.shifted = 0; }")
    page.get_by_role("button", name="Generate").click()
    expect(pane(page)).to_have_attribute("aria-busy", "true")
    expect(written(page)).to_have_text(re.compile(r"\w{20,}"))
    expect(pane(page)).to_have_attribute("aria-busy", "true")  # it is not all there yet
    seen = written(page).inner_text()
    expect(pane(page)).not_to_have_attribute("aria-busy", "true")
    whole = written(page).inner_text()
    assert whole.startswith(seen) and len(whole) > len(seen)
    expect(pane(page).locator("[data-prompt]")).to_have_text("Once")
    expect(pane(page).locator("[data-stats]")).to_have_text(
        re.compile(r"^\d+ tokens · [\d.]+ tokens/s · (ended by itself|full length)$")
    )
    expect(page.locator("[data-status]")).to_contain_text(whole[:100])
    assert page.evaluate("() => window.shifted") < 0.001  # nothing on the page has moved


def test_the_same_seed_writes_the_same_text(visit):
    page = visit("/write")
    settings(page, max_tokens=30)
    page.locator("#temperature").fill("1")
    texts = []
    for seed in ("3", "3", "4"):
        page.locator("#seed").fill(seed)
        write(page)
        texts.append(written(page).inner_text())
    assert texts[0] == texts[1] != texts[2]
    expect(page.locator("[data-seed]")).to_contain_text("4")


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_stops(visit, server, how):
    before = metric(server, 'swlora_texts_total{reason="cancelled"}')
    page = visit("/write")
    settings(page, max_tokens=4000, temperature=1)
    page.get_by_role("button", name="Generate").click()
    expect(written(page)).to_have_text(re.compile(r"\w{20,}"))
    stop = page.get_by_role("button", name="Stop")
    if how == "button":
        stop.click()
    else:
        page.keyboard.press("Escape")
    expect(stop).to_be_disabled()
    expect(pane(page).locator("[data-stats]")).to_contain_text("stopped")
    text = written(page).inner_text()
    page.wait_for_timeout(300)
    assert written(page).inner_text() == text
    assert len(text) < 4000
    for _ in range(50):  # the server has stopped too
        if metric(server, "swlora_active ") == 0:
            break
        page.wait_for_timeout(100)
    assert metric(server, 'swlora_texts_total{reason="cancelled"}') == before + 2


def test_base_and_adapter_stream_side_by_side(visit, screenshots):
    page = visit("/write")
    page.get_by_label("Model", exact=True).select_option("tiny")
    page.get_by_label("Compare with").select_option("mine")
    settings(page, max_tokens=2500, seed=1)
    page.get_by_role("button", name="Generate").click()
    for number in (0, 1):
        expect(written(page, number)).to_have_text(re.compile(r"\w{20,}"))
    for number in (0, 1):  # both at once
        expect(pane(page, number)).to_have_attribute("aria-busy", "true")
    page.screenshot(path=screenshots / "writing.png")
    expect(page.locator("[data-submit]")).to_be_enabled()
    assert written(page, 0).inner_text() != written(page, 1).inner_text()
    left, right = (pane(page, number).bounding_box() for number in (0, 1))
    assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
    expect(pane(page, 1).get_by_role("heading")).to_have_text("mine")
    page.get_by_label("Compare with").select_option("")
    expect(pane(page, 1)).to_be_hidden()


def test_keys_are_enough(visit):
    page = visit("/write")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    for name in ("Text", "Chat", "Restaurant"):
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name=name, exact=True)).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_label("Prompt")).to_be_focused()
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("Keys")
    page.keyboard.press("Control+Enter")
    expect(page.locator("[data-prompt]").first).to_have_text("Keys")
    expect(page.locator("[data-submit]")).to_be_enabled()


def test_what_the_server_refuses_is_said(visit):
    page = visit("/write", refusals=1)
    page.get_by_label("Prompt").fill("x" * 5000)
    page.get_by_role("button", name="Generate").click()
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("context")
    expect(page.locator("[data-submit]")).to_be_enabled()
    expect(pane(page).locator("[data-stats]")).to_be_empty()


def test_a_lost_connection_is_said(visit):
    page = visit("/write", refusals=1)
    page.route("**/api/generate", lambda route: route.abort())
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("connection")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()


def test_the_restaurant_form_becomes_a_prompt(visit):
    page = visit("/restaurant?example=1")
    meaning, references = page.locator("[data-meaning]"), page.locator("[data-references] li")
    expect(meaning).to_have_text("name[Zizzi], food[Thai]")
    expect(references).to_have_text(["Zizzi serves Thai food."])
    page.get_by_label("Food").select_option("")
    page.get_by_label("Name", exact=True).fill("Aromi")
    page.get_by_label("Kind of place").select_option("pub")
    page.get_by_label("Area").select_option("riverside")
    expect(meaning).to_have_text("name[Aromi], eatType[pub], area[riverside]")
    expect(references).to_have_count(2)
    page.get_by_label("Name", exact=True).fill("Nowhere")
    page.get_by_role("button", name="Generate").click()  # before the pause is over
    expect(written(page)).to_have_text(re.compile(r"\w{20,}"))
    expect(meaning).to_have_text("name[Nowhere], eatType[pub], area[riverside]")
    expect(references).to_have_count(0)
    expect(page.get_by_text("no restaurant with exactly these facts")).to_be_visible()
    expect(page.locator("[data-submit]")).to_be_enabled()


def test_a_tick_sets_a_weight_to_zero_for_one_text(visit):
    page = visit("/super-weights")
    expect(page.get_by_role("checkbox").first).to_be_checked()  # the best proved one
    expect(pane(page, 1)).to_be_visible()
    page.get_by_role("checkbox").first.press("Space")
    expect(pane(page, 1)).to_be_hidden()  # nothing waits for a text that will not come
    expect(page.get_by_text("No weight is ticked")).to_be_visible()
    name = re.compile(r"Set to zero layer 1 mlp.down_proj \[out 7, in 11\]")
    tick = page.get_by_role("checkbox", name=name)
    tick.check()
    settings(page, max_tokens=60)
    write(page)
    intact, broken = written(page, 0).inner_text(), written(page, 1).inner_text()
    assert intact != broken
    write(page)  # greedy, and nobody else has changed the model
    assert (written(page, 0).inner_text(), written(page, 1).inner_text()) == (intact, broken)
    tick.press("Space")
    expect(tick).not_to_be_checked()
    write(page)
    assert written(page, 0).inner_text() == intact
    expect(written(page, 1)).to_be_empty()
    expect(page.get_by_role("img", name=re.compile("Largest outputs"))).to_be_visible()


def test_forms_work_without_javascript(visit):
    page = visit("/write", refusals=1, java_script_enabled=False)
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    page.get_by_label("Prompt").fill("Once")
    page.get_by_role("button", name="Generate").click()
    expect(written(page, 0)).to_have_text(re.compile(r"\w{20,}"))
    expect(written(page, 1)).to_have_text(re.compile(r"\w{20,}"))
    expect(page.get_by_label("Prompt")).to_have_value("Once")
    page.goto("/restaurant")
    page.get_by_role("button", name="Generate").click()
    expect(written(page)).to_have_text(re.compile(r"\w{20,}"))
    page.goto("/super-weights")
    page.get_by_role("button", name="Generate").click()
    assert written(page, 0).inner_text() != written(page, 1).inner_text()
    page.locator("#prompt").fill(" ")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_be_visible()
