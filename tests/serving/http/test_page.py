"""The page in a real browser, wide and phone-narrow: search, pick, read the reasons, by the pointer and by keys."""

import re

import pytest
from playwright.sync_api import expect

from speeder.model.explain import explain
from tests.serving.http.browser import browser
from tests.serving.http.worlds import MARKUP, TITLES, listening, served_model

pytestmark = pytest.mark.slow
SOON = 90_000  # milliseconds
expect.set_options(timeout=SOON)
WIDE, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return served_model(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def address(model):
    with listening(model, name="films") as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    with browser() as chromium:
        yield chromium


@pytest.fixture
def opened(chromium, address):
    """Opens the page in a window of some size; nothing may fail, be blocked, or come from another server."""
    contexts, wrong = [], []

    def open_page(size=WIDE, picks="", refused=False, **options):
        width, height = size
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SOON)
        page.set_default_navigation_timeout(SOON)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        if not refused:  # a refusal is an error to the console
            page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
        page.on(
            "request", lambda request: None if request.url.startswith(address) else wrong.append(request.url)
        )
        page.goto(f"{address}/{picks and '#' + picks}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def picked(page):
    return page.locator("#picked li > span").all_text_contents()


def test_a_person_picks_films_and_sees_what_is_recommended_and_why(opened, model):
    page = opened()
    expect(page.locator("#empty")).to_be_visible()
    expect(page.locator("#about")).to_have_text(f"films · {len(TITLES)} items")
    for query, title in (("star w", "Star Wars (1977)"), ("brave", "Braveheart (1995)")):
        page.get_by_role("combobox", name="Search by title").fill(query)
        page.get_by_role("option", name=title).click()
    expect(page.locator("#status")).to_contain_text(
        "your 2 picks"
    )  # cards of the first pick alone may be there
    expect(page.locator(".card .shares")).to_have_count(12)
    assert picked(page) == ["Star Wars (1977)", "Braveheart (1995)"]
    assert page.url.endswith("#i1,i12")

    expected = model.recommend([["i1", "i12"]], 12)[0]
    shown = [card.get_attribute("data-id") for card in page.locator(".card").all()]
    assert shown == [item.id for item in expected]
    for card, why in zip(page.locator(".card").all(), explain(model, ["i1", "i12"], shown), strict=True):
        shares = card.locator(".shares").get_attribute("aria-label")
        assert f"Text {round(100 * why.gates['text'])} %" in shares
        assert f"Item embedding {round(100 * why.gates['item'])} %" in shares
        effects = {
            line.split("\n")[0]: line.split("\n")[-1]
            for line in card.locator(".effects li").all_inner_texts()
        }
        told = {e.title: f"{'−' if e.change < 0 else '+'}{abs(e.change):.2f}" for e in why.history}  # noqa: RUF001
        assert effects == told

    page.get_by_role("button", name="Remove Star Wars (1977)").click()
    expect(page.locator("#status")).to_contain_text("12 for your pick")
    assert picked(page) == ["Braveheart (1995)"]
    page.locator(".card .add").first.click()
    expect(page.locator("#status")).to_contain_text("your 2 picks")
    page.get_by_role("button", name="Remove all").click()
    expect(page.locator("#empty")).to_be_visible()
    assert picked(page) == [] and page.locator(".card").count() == 0


def test_by_keys_alone(opened):
    page = opened()
    expect(page.locator("#about")).not_to_be_empty()
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "query":
            break
    page.keyboard.type("star")
    expect(page.get_by_role("option")).to_have_count(2)
    query = page.locator("#query")
    expect(query).to_have_attribute("aria-expanded", "true")
    expect(query).to_have_attribute("aria-activedescendant", "hit-0")
    page.keyboard.press("ArrowDown")
    expect(query).to_have_attribute("aria-activedescendant", "hit-1")
    page.keyboard.press("Enter")
    expect(page.locator("#picked li")).to_have_count(1)
    assert picked(page) == ["Star Trek: First Contact (1996)"]
    page.keyboard.type("heat")
    expect(page.get_by_role("option")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.get_by_role("option")).to_have_count(0)
    expect(page.locator(".card .shares")).to_have_count(12)
    page.locator("#picked button").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#picked li")).to_have_count(0)
    assert page.evaluate("document.activeElement.id") == "query"


def test_titles_are_text_and_never_markup(opened):
    page = opened(picks="i7,i1")
    expect(page.locator(".card .shares")).to_have_count(12)
    assert picked(page)[0] == MARKUP
    assert MARKUP in page.locator(".effect-title").all_text_contents()
    page.get_by_role("combobox").fill("bold")
    expect(page.get_by_role("option", name=MARKUP, exact=True)).to_be_visible()
    assert page.title() == "Speeder: recommendations"
    assert page.locator("#picked b, .card b, #hits b, [onerror]").count() == 0


def test_posters_where_there_are_some_and_drawn_covers_elsewhere(opened):
    page = opened(picks="i1,i12")
    expect(page.locator(".card .shares")).to_have_count(12)
    for card in page.locator(".card").all():
        row = card.get_attribute("data-id")
        cover = card.locator(".cover")
        card.scroll_into_view_if_needed()
        if row.startswith("i") and int(row[1:]) % 3 == 0:
            expect(cover.locator("img")).to_have_js_property("complete", True)
            assert cover.locator("img").evaluate("image => image.naturalWidth") == 320
        else:
            expect(cover).to_have_class(re.compile("drawn"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE, (320, 640)], ids=lambda size: str(size[0]))
def test_it_fits_any_width_and_reads_in_both_schemes(opened, size, scheme):
    page = opened(size, picks="i14,i15,i7,i1,i2", color_scheme=scheme)
    expect(page.locator(".card .shares")).to_have_count(12)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    beyond = page.evaluate(
        """() => [...document.querySelectorAll("h1, h2, h3, h4, p, button, input, .picked span, .number, .shares")]
            .filter(e => e.offsetParent && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML)"""
    )
    assert beyond == []
    columns = page.evaluate(
        "getComputedStyle(document.querySelector('.cards')).gridTemplateColumns.split(' ').length"
    )
    assert columns == (2 if size == WIDE else 1)
    contrast = page.evaluate(CONTRAST)
    assert all(ratio >= 4.5 for ratio in contrast.values()), contrast


CONTRAST = """() => {
    const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = colour => numbers(colour).slice(0, 3)
        .map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = e => {
        for (; e; e = e.parentElement) {
            const colour = getComputedStyle(e).backgroundColor;
            if ((numbers(colour)[3] ?? 1) > 0) return colour;
        }
    };
    const found = {};
    for (const name of ["h1", "#status", ".card h3", ".why h4", ".number", ".add", ".effect-title", ".about", "nav a",
                        "#footnote", ".legend li", ".shares span"]) {
        const e = document.querySelector(name);
        const [one, other] = [light(getComputedStyle(e).color), light(behind(e))].sort((a, b) => b - a);
        found[name] = (one + 0.05) / (other + 0.05);
    }
    return found;
}"""


def test_what_the_server_refuses_is_said(opened):
    page = opened(picks="i1,nobody", refused=True)
    expect(page.get_by_role("alert")).to_have_text(
        re.compile("history.1: expected the id of an item, got nobody")
    )
    page.get_by_role("button", name="Remove Item nobody").click()
    expect(page.locator(".card .shares")).to_have_count(12)
    expect(page.get_by_role("alert")).to_have_count(0)
    page.evaluate("location.hash = 'i1,nobody'")
    expect(page.get_by_role("alert")).to_be_visible()
    expect(page.locator(".card")).to_have_count(0)


def test_a_busy_server_is_asked_again(opened):
    page = opened(refused=True)
    asked = []

    def busy_once(route):
        asked.append(1)
        if len(asked) > 1:
            return route.continue_()
        return route.fulfill(status=503, headers={"Retry-After": "1"}, json={"errors": [{"message": "full"}]})

    page.route("**/v1/recommend", busy_once)
    page.get_by_role("combobox").fill("heat")
    page.get_by_role("option").click()
    expect(page.locator(".card .shares")).to_have_count(12)
    assert len(asked) == 2


def test_the_apis_page_shows_every_path(chromium, address):
    page = chromium.new_page()
    page.set_default_timeout(SOON)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address + "/docs")
    expect(page.locator(".opblock")).to_have_count(8)
    page.close()
    assert not errors
