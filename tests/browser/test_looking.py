"""A person looks: every page in every width, curves that grow, pictures for who was not there."""

import pytest
from playwright.sync_api import expect

from swlora.files import write_json

pytestmark = [pytest.mark.browser, pytest.mark.allow_hosts(["127.0.0.1"])]
PAGES = {
    "write": "/write",
    "chat": "/",
    "restaurant": "/restaurant",
    "super-weights": "/super-weights",
    "runs": "/runs",
    "run": "/runs/now",
    "identified": "/runs/found",
    "study": "/studies/study",
}
SIZES = {"phone": (375, 740), "desktop": (1280, 850)}


@pytest.mark.parametrize("name", PAGES)
def test_no_page_is_wider_than_its_window(visit, step_log, name):
    step_log(40)
    page = visit(PAGES[name])
    for width in (320, 375, 768, 1280, 1920):
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width, width
        for details in page.locator("details:not([open]) > summary").all():
            details.click()
    expect(page.get_by_role("navigation", name="Pages").get_by_role("link")).to_have_count(3)


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_of_every_page(visit, step_log, screenshots, name, size, scheme):
    step_log(40)
    page = visit(PAGES[name], *SIZES[size], color_scheme=scheme)
    back = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in back.removeprefix("rgb(").rstrip(")").split(","))
    assert (brightness < 150) == (scheme == "dark")
    picture = page.screenshot(full_page=True, path=screenshots / f"{name}-{size}-{scheme}.png")
    assert len(picture) > 5000


def test_a_curve_grows_until_the_training_is_over(visit, step_log, runs):
    step_log(10)
    page = visit("/runs/now")
    steps = page.locator(".numbers dd").first
    expect(steps).to_have_text("10")
    line = page.locator("path.line.main")
    before = line.get_attribute("d")
    step_log(25)
    expect(steps).to_have_text("25")
    assert line.get_attribute("d") != before
    facts = {"status": "done", "command": "train", "started_at": "2030-01-01T10:00:00Z"}
    write_json(runs / "now/run.json", facts | {"timings_s": {"total": 99.0}})
    expect(page.get_by_text("took 2 min")).to_be_visible()
    expect(page.locator("[data-over]")).to_have_text("It is over.")


def test_the_list_is_kept_up_to_date_and_keeps_the_focus(visit, step_log, runs):
    step_log(5)
    page = visit("/runs")
    expect(page.get_by_text("step 5 ·")).to_be_visible()
    link = page.get_by_role("link", name="now", exact=True)
    link.focus()
    step_log(6)
    expect(page.get_by_text("step 6 ·")).to_be_visible()
    expect(link).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("now")


def test_a_strange_name_leads_to_its_run(visit, runs):
    name = "50%41 <i>&#? ü"
    write_json(runs / name / "run.json", {"status": "done", "command": "train"})
    page = visit("/runs")
    link = page.get_by_role("link", name=name, exact=True)
    expect(link).to_be_visible()
    link.click()
    expect(page.get_by_role("heading", level=1)).to_have_text(name)


def test_who_wants_little_motion_gets_none(visit):
    page = visit("/write", reduced_motion="reduce")
    pulse = "() => getComputedStyle(document.querySelector('.stats'), '::before').animationName"
    page.locator("[data-pane]").first.evaluate("(pane) => pane.setAttribute('aria-busy', 'true')")
    assert page.evaluate(pulse) == "none"
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(pulse) == "pulse"


def test_pages_are_read_without_javascript(visit, step_log):
    step_log(40)
    for path in PAGES.values():
        page = visit(path, java_script_enabled=False)
        expect(page.get_by_role("heading", level=1)).to_be_visible()
    page = visit("/runs/now", java_script_enabled=False)
    expect(page.get_by_role("img", name="Loss")).to_be_visible()
