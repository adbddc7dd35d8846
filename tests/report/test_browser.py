"""The page in headless Chromium: what a reader sees, at a desk and on a phone, by day and by night."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browsing import Browser, open_browser
from markupsafe import Markup

from batchnorm.report import html
from batchnorm.report.document import Document, Figure, Section, Verdict

pytestmark = pytest.mark.browser

SIZES = {"desktop": (1280, 800), "phone": (375, 812)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    yield from open_browser()


@pytest.fixture
def page(document: Document, tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    path.write_text(html.render(document, data={"accuracy": [0.1, float("nan")]}), encoding="utf-8")
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Document], Path]:
    def save(document: Document) -> Path:
        path = tmp_path / "other.html"
        path.write_text(html.render(document), encoding="utf-8")
        return path

    return save


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_draws_everything_alone_and_in_silence(
    browser: Browser, page: Path, size: str, scheme: str
) -> None:
    width, height = SIZES[size]
    browser.look(page, width=width, height=height, scheme=scheme)
    browser.drawn(3)
    assert browser.complaints() == []
    assert browser.requests() == {page.as_uri()}
    assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    plot_widths = browser.run(
        "[...document.querySelectorAll('.plot.drawn')].map(p => p.querySelector('svg').clientWidth)"
    )
    assert all(0.6 * min(width, 1000) < plot <= width for plot in plot_widths)
    assert browser.run(
        "[...document.querySelectorAll('.plot.drawn .alt')].every(alt => alt.offsetHeight === 0)"
    )
    dark = browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert dark == (scheme == "dark")
    assert browser.stroke(0) != browser.stroke(1)


@pytest.mark.parametrize("size", SIZES)
def test_the_first_screen_is_the_verdict_and_the_first_figure(
    browser: Browser, page: Path, size: str
) -> None:
    width, height = SIZES[size]
    browser.look(page, width=width, height=height)
    browser.drawn(3)
    bottoms = browser.run(
        "['h1', '.lead', '.verdict:last-child'].map(s => document.querySelector(s).getBoundingClientRect().bottom)"
    )
    assert bottoms == sorted(bottoms)
    assert bottoms[-1] < height
    plot = browser.run("document.querySelector('.plot').getBoundingClientRect().toJSON()")
    seen = (min(plot["bottom"], height) - plot["top"]) / plot["height"]
    assert seen > (0.95 if size == "desktop" else 0.3)


def test_the_figures_follow_a_change_of_theme_without_a_reload(browser: Browser, page: Path) -> None:
    browser.look(page)
    browser.drawn(3)
    light = browser.stroke(0)
    assert light == "rgb(0, 104, 168)"
    browser.theme("dark")
    browser.wait(
        "getComputedStyle(document.querySelector('.scatterlayer .js-line')).stroke !== 'rgb(0, 104, 168)'"
    )
    assert browser.stroke(0) == "rgb(98, 181, 240)"
    assert browser.run("document.querySelector('.xtick text').style.fill") == "rgb(160, 169, 180)"
    assert browser.complaints() == []


def test_small_multiples_stand_below_each_other_on_a_phone(browser: Browser, page: Path) -> None:
    ticks = "[...document.querySelectorAll('#figure-footing :is(.xtick, .x2tick) text')]"
    boxes = f"{ticks}.map(tick => tick.getBoundingClientRect().top)"
    browser.look(page)
    browser.drawn(3)
    assert len({round(top) for top in browser.run(boxes)}) == 1
    browser.window(375, 812)
    browser.wait(f"new Set({boxes}.map(Math.round)).size === 2")


def test_a_folded_section_draws_its_figure_when_it_opens(browser: Browser, page: Path) -> None:
    browser.look(page)
    browser.drawn(3)
    browser.run("document.querySelector('section > details > summary').click()")
    browser.drawn(4)
    assert browser.run("document.querySelector('#figure-rates-2 svg').clientWidth") > 600


def test_wide_tables_scroll_in_their_own_box(browser: Browser, page: Path) -> None:
    browser.look(page, width=375, height=812)
    box = browser.run(
        "(b => [b.scrollWidth > b.clientWidth, b.tabIndex])(document.querySelector('.table-box'))"
    )
    assert box == [True, 0]


def test_print_is_light_and_complete(browser: Browser, page: Path) -> None:
    browser.look(page, scheme="dark")
    browser.drawn(3)
    browser.run("dispatchEvent(new Event('beforeprint'))")
    browser.drawn(4)
    browser.wait(
        "getComputedStyle(document.querySelector('.scatterlayer .js-line')).stroke === 'rgb(0, 104, 168)'"
    )
    browser.run("dispatchEvent(new Event('afterprint'))")
    browser.wait(
        "getComputedStyle(document.querySelector('.scatterlayer .js-line')).stroke === 'rgb(98, 181, 240)'"
    )
    assert browser.run("document.querySelector('section > details').open") is False


def test_without_scripts_the_words_stand_in(browser: Browser, page: Path) -> None:
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.look(page)
        assert "passes 90 % after 70 steps" in browser.driver.find_element("css selector", ".plot .alt").text
        assert browser.driver.find_element("css selector", ".plot").size["height"] < 100
        assert not browser.driver.find_element("css selector", "#download").is_displayed()
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_broken_plotly_leaves_the_words(
    browser: Browser, document: Document, saved: Callable[[Document], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html, "_plotly", lambda: Markup("throw new Error('broken')"))
    browser.look(saved(document))
    browser.wait("document.querySelectorAll('.plot.failed').length === 4")
    assert "passes 90 %" in browser.driver.find_element("css selector", ".plot .alt").text


def test_hostile_names_stay_text(browser: Browser, saved: Callable[[Document], Path]) -> None:
    evil = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"
    figure = Figure("f", evil, [{"name": evil, "y": [1, 2], "showlegend": True}], {}, alt=evil)
    browser.look(saved(Document(evil, evil, [Section(evil, [Verdict(evil, evil, evil), figure])])))
    browser.drawn(1)
    assert browser.run("window.broken === undefined")
    assert browser.run("document.title") == evil
    assert browser.complaints() == []
