"""A person chats: turns stream, stop, are written again and forgotten; two models side by side."""

import re

import pytest
from playwright.sync_api import Page, expect

pytestmark = [pytest.mark.browser, pytest.mark.allow_hosts(["127.0.0.1"])]
LETTERS = re.compile(r"\w{10,}")


def turns(page: Page, side: int = 0):
    return page.locator("[data-turns]").nth(side).locator(".said")


def say(page: Page, text: str) -> None:
    """Send a message by its key and wait for the answer."""
    message = page.get_by_label("Message")
    message.fill(text)
    message.press("Enter")
    expect(message).to_have_value("")  # it is sent; a short answer may be there already
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def set_up(page: Page, **values: object) -> None:
    page.locator("summary", has_text="Settings").click()
    for name, value in values.items():
        page.locator(f"#{name}").fill(str(value))


def test_several_turns_each_sent_with_those_before(visit):
    page = visit("/")  # an instruct model opens in the chat
    asked = []
    page.on("request", lambda r: r.url.endswith("/generate") and asked.append(r.post_data_json))
    set_up(page, max_tokens=30, seed=3)
    page.get_by_label("System prompt").fill("Be brief.")
    page.evaluate("() => { window.shifted = 0; }")
    say(page, "Hello")
    message = page.get_by_label("Message")
    expect(message).to_be_focused()
    expect(message).to_have_value("")
    message.type("one")
    message.press("Shift+Enter")
    message.type("two")
    message.press("Enter")
    expect(turns(page)).to_have_count(4)
    expect(turns(page).nth(3)).to_have_text(LETTERS)
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    said = turns(page).all_inner_texts()
    assert (said[0], said[2]) == ("Hello", "one\ntwo")
    system = {"role": "system", "content": "Be brief."}
    roles = ("user", "assistant", "user")
    first = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    assert [body["messages"] for body in asked] == [[system, first[0]], [system, *first]]
    expect(page.locator("[data-status]")).to_contain_text(said[3][:20])
    assert page.evaluate("() => window.shifted") < 0.001  # nothing on the page has moved


def test_regenerate_writes_the_last_answer_again_and_reset_forgets(visit):
    page = visit("/chat")
    again, reset = (page.get_by_role("button", name=name) for name in ("Regenerate", "Reset chat"))
    expect(again).to_be_disabled()
    expect(reset).to_be_disabled()
    set_up(page, max_tokens=30, temperature=1)
    say(page, "Hello")
    before = turns(page).all_inner_texts()
    again.click()
    # Not that the button is off meanwhile: a short answer may be there before anybody looks
    expect(turns(page).nth(1)).not_to_have_text(before[1])
    expect(again).to_be_enabled()
    after = turns(page).all_inner_texts()
    assert after[0] == before[0] and len(after) == 2 and after[1] != before[1]
    reset.click()
    expect(turns(page)).to_have_count(0)
    expect(page.get_by_text("Nothing has been said yet.").first).to_be_visible()
    expect(page.locator("[data-stats]").first).to_be_empty()
    expect(page.get_by_label("Message")).to_be_focused()


def test_stop_keeps_what_is_there(visit):
    page = visit("/chat")
    set_up(page, max_tokens=3000, temperature=1)
    page.get_by_label("Message").fill("Hello")
    page.get_by_role("button", name="Send").click()
    expect(turns(page).nth(1)).to_have_text(LETTERS)
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    expect(page.locator("[data-stats]").first).to_contain_text("stopped")
    text = turns(page).nth(1).inner_text()
    page.wait_for_timeout(300)
    assert turns(page).nth(1).inner_text() == text and len(text) < 3000
    expect(page.get_by_label("Message")).to_be_focused()


def test_two_models_chat_side_by_side(visit, screenshots):
    page = visit("/chat?model=mine")
    expect(page.get_by_label("Model", exact=True)).to_have_value("mine")
    page.get_by_label("Compare with").select_option("tiny")
    set_up(page, max_tokens=40, seed=1)
    say(page, "Hello")
    page.screenshot(path=screenshots / "chatting.png")
    left, right = (turns(page, side).all_inner_texts() for side in (0, 1))
    assert left[0] == right[0] == "Hello" and left[1] != right[1]
    expect(page.get_by_role("heading", level=2)).to_have_text(["mine", "tiny"])


def test_what_is_refused_was_not_said(visit):
    page = visit("/chat", refusals=1)
    page.get_by_label("Message").fill("x" * 5000)
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("alert")).to_contain_text("context")
    expect(turns(page)).to_have_count(0)
    expect(page.get_by_label("Message")).to_have_value("x" * 5000)


def test_a_chat_goes_on_without_javascript(visit):
    page = visit("/chat", java_script_enabled=False)
    for number in (1, 2):
        page.get_by_label("Message").fill(f"message {number}")
        page.get_by_role("button", name="Send").click()
        expect(turns(page)).to_have_count(2 * number)
        expect(turns(page).nth(2 * number - 1)).to_have_text(LETTERS)
    page.get_by_role("button", name="Regenerate").click()
    expect(turns(page)).to_have_count(4)
    page.get_by_role("button", name="Reset chat").click()
    expect(turns(page)).to_have_count(0)
