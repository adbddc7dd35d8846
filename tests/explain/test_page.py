"""The page: in the text what it holds, in headless Chromium what it does."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import Browser, open_browser

from batchnorm.explain.page import SCRIPTS
from batchnorm.explain.page import page as build
from batchnorm.explain.questions import SHOWN, questions
from batchnorm.explain.runners import Settings, season
from batchnorm.explain.texts import TEXTS
from batchnorm.explain.words import as_text, say

START = {"difference": 15, "trend": 0.15, "runners": 16, "eps": -5, "gamma": 3, "beta": 90}
MOVES: list[dict[str, float]] = [
    {},
    {"difference": 0},
    {"difference": 25, "trend": 0.4},
    {"runners": 2},
    {"runners": 24, "eps": 0.25},
    {"eps": 3, "gamma": 0.7, "beta": 97},
    {"trend": 0},
    {"gamma": 0},
    {"gamma": 0, "trend": 0},
    {"eps": -4.75, "difference": 1, "trend": 0.01},
    {"eps": -1, "runners": 3},
    {"runners": 24, "trend": 0.4, "difference": 0},
    {"eps": 3, "difference": 0, "trend": 0.05},
    {"difference": 0, "runners": 2},
    {"difference": 8, "trend": 0.05, "runners": 2},
    {"difference": 8, "trend": 0.4},
    {"difference": 8, "trend": 0.4, "runners": 2},
    {"eps": -1.25},
]


@pytest.fixture(scope="module")
def text() -> str:
    return build()


@pytest.fixture(scope="module")
def path(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("explain") / "story.html"
    target.write_text(text, encoding="utf-8")
    return target


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    yield from open_browser()


def test_the_page_is_one_file_and_asks_nobody(text: str) -> None:
    assert "default-src 'none'" in text
    own = text[: text.index("<script>")] + text[text.rindex("<script>") :]
    assert not re.search(r'(?:src|href)="(?!data:)', own)
    assert len(re.findall(r'<input type="range"', text)) == 6
    assert len(re.findall(r'<fieldset class="question"', text)) == 6


def test_the_pages_scripts_are_short() -> None:
    import batchnorm.explain

    folder = Path(batchnorm.explain.__file__).with_name("templates")
    assert {path.name for path in folder.iterdir()} == set(SCRIPTS)
    for name in SCRIPTS:
        assert len((folder / name).read_text("utf-8").splitlines()) <= 200


def moved(values: dict[str, float]) -> Settings:
    at = {**START, **values}
    return Settings(
        difference=at["difference"],
        trend=at["trend"],
        runners=int(at["runners"]),
        eps=10 ** at["eps"],
        gamma=at["gamma"],
        beta=at["beta"],
    )


def slide(browser: Browser, values: dict[str, float]) -> None:
    """Move the sliders as a reader does: the input event follows the value."""
    for name, value in {**START, **values}.items():
        browser.run(
            f"(s => {{ s.value = {value}; s.dispatchEvent(new Event('input', {{bubbles: true}})); return true; }})"
            f"(document.getElementById('slider-{name}'))"
        )


def flat(value: Any) -> list[float]:
    return [number for item in value for number in flat(item)] if isinstance(value, list) else [value]


@pytest.mark.browser
def test_the_browser_computes_what_the_library_computes(browser: Browser, path: Path) -> None:
    browser.look(path)
    for move in MOVES:
        slide(browser, move)
        expected = season(moved(move)).to_dict()
        found = browser.run("batchnormReport.season")
        for name in ("members", "form", "x", "mean", "var", "xhat", "y"):
            wanted, got = flat(expected[name]), flat(found[name])
            assert len(wanted) == len(got)
            worst = max(abs(a - b) for a, b in zip(wanted, got, strict=True))
            assert worst <= 1e-6 * max(1.0, max(map(abs, wanted))), (move, name)
        for name in ("before", "after"):
            if expected[name] is None:
                assert found[name] is None
            else:
                assert math.isclose(found[name], expected[name], abs_tol=1e-6)
    assert browser.complaints() == []


@pytest.mark.browser
def test_the_browser_says_what_the_library_says(browser: Browser, path: Path) -> None:
    browser.look(path)
    for move in MOVES:
        slide(browser, move)
        found = season(moved(move))
        assert browser.run("batchnormReport.said") == {name: say(name, found) for name in TEXTS}, move
        shown = browser.run("document.querySelector('main').textContent")
        assert [name for name in TEXTS if say(name, found) not in shown] == [], move
    slide(browser, {})
    assert browser.complaints() == []  # a text that is found nowhere, or twice, is one


@pytest.mark.browser
def test_a_correlation_that_is_not_there_says_why(browser: Browser, path: Path) -> None:
    browser.look(path)
    slide(browser, {"gamma": 0})
    card = browser.run("document.querySelectorAll('#raw-times .verdict')[1].textContent")
    assert "no correlation" in card
    assert "every output is the same β" in card
    assert "every output is the same β" in browser.run("document.querySelector('.meters').textContent")
    assert "–" not in browser.run("document.querySelector('.meters').textContent")
    slide(browser, {"trend": 0})
    assert "Nobody's form changes" in browser.run("document.querySelector('.meters').textContent")
    slide(browser, {})
    assert browser.run("document.querySelector('.meters .why').textContent") == ""


@pytest.mark.browser
def test_epsilon_has_one_form(browser: Browser, path: Path) -> None:
    browser.look(path)
    for value, form in ((-5, "0.00001"), (-4.75, "0.000018"), (-0.25, "0.56"), (3, "1000")):
        slide(browser, {"eps": value})
        assert browser.run("document.querySelector('#slider-eps-value').textContent") == f"{form} s²"
        numbers = browser.run("document.querySelector('#formula-normalize .numbers').textContent")
        assert f" + {form})" in numbers


@pytest.mark.browser
def test_with_two_runners_a_day_the_lines_are_there(browser: Browser, path: Path) -> None:
    browser.look(path)
    browser.drawn(9)
    slide(browser, {"runners": 2})
    browser.run("(document.documentElement.style.scrollBehavior = 'auto', scrollTo(0, 300))")
    line = "document.querySelector('#figure-raw .canvas').data[2]"
    browser.wait(f"{line}.x.length === 3")
    assert "3 runs" in browser.run("document.querySelector('#figure-raw ~ .caption').textContent")
    slide(browser, {"difference": 0})
    browser.wait("document.querySelector('#figure-raw .canvas').data[1].name === 'hot day, now as cool'")


@pytest.mark.browser
def test_words_pictures_and_bars_follow_the_sliders(browser: Browser, path: Path) -> None:
    browser.look(path)
    browser.drawn(9)
    opened = browser.run("[...document.querySelectorAll('.formula .numbers')].map(e => e.textContent)")
    slide(browser, {})
    same = browser.run("[...document.querySelectorAll('.formula .numbers')].map(e => e.textContent)")
    assert same == opened  # the library's words and the script's are one
    slide(browser, {"difference": 5, "gamma": 1.5})
    assert browser.run("document.querySelector('#slider-difference-value').textContent") == "5 °C"
    assert browser.run("document.querySelector('#slider-gamma').getAttribute('aria-valuetext')") == "1.5"
    after = season(moved({"difference": 5}))
    headline = browser.run("document.querySelector('#raw-times .verdict .headline').textContent")
    assert headline == f"correlation {after.before:.2f}"
    mean = browser.run("document.querySelector('#formula-mean .numbers').textContent")
    assert mean.endswith(f"/ 16 = {after.mean[2]:.2f}")
    browser.run("(document.documentElement.style.scrollBehavior = 'auto', scrollTo(0, 900))")
    drawn = "document.querySelector('#figure-mean .canvas').data[1].y[2]"
    browser.wait(f"Math.abs({drawn} - {after.mean[2].item()}) < 1e-6")
    browser.run("document.querySelector('.controls .reset').click()")
    assert browser.run("document.querySelector('#slider-gamma').value") == "3"
    assert (
        browser.run("[...document.querySelectorAll('.formula .numbers')].map(e => e.textContent)") == opened
    )


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_it_draws_everything_alone_and_in_silence(
    browser: Browser, path: Path, width: int, scheme: str
) -> None:
    browser.look(path, width=width, height=812, scheme=scheme)
    browser.drawn(9)
    assert browser.complaints() == []
    assert browser.requests() == {path.as_uri()}
    assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    # The sliders lie beside the story at a desk, folded under it on a phone, and stay in sight.
    assert browser.run("document.querySelector('.controls details').open") is (width > 1024)
    browser.run("(document.documentElement.style.scrollBehavior = 'auto', scrollTo(0, 3000))")
    box = browser.run("document.querySelector('.controls').getBoundingClientRect().toJSON()")
    assert box["bottom"] > 0
    assert box["top"] < 812


@pytest.mark.browser
def test_a_phone_sees_all_of_it(browser: Browser, path: Path) -> None:
    browser.look(path, width=375, height=812)
    browser.drawn(9)
    height = "document.querySelector('.controls').getBoundingClientRect().height"
    assert browser.run(height) < 60
    browser.run("document.querySelector('.controls details').open = true")
    assert browser.run(height) < 0.36 * 812
    slide(browser, {"eps": -4.75})
    assert browser.run(
        "[...document.querySelectorAll('.controls *')].every(e => e.getBoundingClientRect().right <= 360)"
    )
    assert browser.run(
        "[...document.querySelectorAll('.table-box')].every(box => box.scrollWidth <= box.clientWidth)"
    )
    # The outline of a focused slider stays off its label.
    browser.run("document.querySelector('#slider-eps').focus({focusVisible: true})")
    style = "getComputedStyle(document.querySelector('#slider-eps'))"
    assert browser.run(f"parseFloat({style}.outlineOffset) + parseFloat({style}.outlineWidth)") <= 0
    for question in questions():
        place = f"document.getElementById('question-{question.id}')"
        browser.run(f"{place}.querySelector('input').click()")
        browser.run(f"{place}.querySelector('.see').click()")
    assert browser.run("document.documentElement.scrollWidth") == 375


@pytest.mark.browser
def test_a_keyboard_is_enough(browser: Browser, path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.look(path)
    slider = browser.driver.find_element("id", "slider-runners")
    slider.send_keys(Keys.ARROW_LEFT)
    assert browser.run("batchnormReport.season.x[0].length") == 15
    question = browser.driver.find_element("id", "question-cool")
    radio = question.find_element("css selector", "input")
    radio.send_keys(Keys.SPACE)
    radio.send_keys(Keys.ARROW_DOWN)
    question.find_element("class name", "see").send_keys(Keys.ENTER)
    assert "saw it coming" in question.find_element("class name", "outcome").text


@pytest.mark.browser
def test_a_question_is_predicted_then_seen(browser: Browser, path: Path) -> None:
    browser.look(path)
    for question in questions():
        place = f"document.getElementById('question-{question.id}')"
        assert browser.run(f"{place}.querySelector('.see').disabled")
        assert browser.run(f"{place}.querySelector('.seen').hidden")
        wrong = (question.answer + 1) % len(question.options)
        browser.run(f"{place}.querySelectorAll('input')[{wrong}].click()")
        browser.run(f"{place}.querySelector('.see').click()")
        assert "otherwise" in browser.run(f"{place}.querySelector('.outcome').textContent")
        browser.run(f"{place}.querySelectorAll('input')[{question.answer}].click()")
        browser.run(f"{place}.querySelector('.see').click()")
        assert "saw it coming" in browser.run(f"{place}.querySelector('.outcome').textContent")
    assert browser.complaints() == []


@pytest.mark.browser
def test_an_answer_shows_what_was_asked_beside_the_page_as_it_opens(browser: Browser, path: Path) -> None:
    browser.look(path)
    for question in questions():
        # Wherever the sliders stood: what an answer is compared with is how the page opens.
        slide(browser, {"difference": 3, "runners": 5, "gamma": 0.5})
        place = f"document.getElementById('question-{question.id}')"
        browser.run(f"{place}.querySelector('input').click()")
        browser.run(f"{place}.querySelector('.see').click()")
        panels = SHOWN[question.id]
        seasons = {"start": season(), "asked": season(moved(dict(question.settings)))}
        cells = browser.run(
            f"[...{place}.querySelectorAll('.compared tr')].map(r => [...r.cells].map(c => c.textContent))"
        )
        names = {"x": "raw times (s)", "xhat": "normalized times"}
        if panels[0][1] == panels[1][1]:
            assert cells[0][1] == "as the page opens"
        else:
            assert cells[0][1:] == [names[what] for _, what in panels]
        for column, (at, what) in enumerate(panels, start=1):
            found, values = seasons[at], getattr(seasons[at], what)
            cool, hot = (as_text(values[found.hot == kind].mean().item(), 2) for kind in (0, 1))
            assert cells[1][column] == f"{cool} / {hot}"
            low, high = as_text(values.min().item(), 2), as_text(values.max().item(), 2)
            assert cells[3][column] == f"{low} / {high}"
            told = found.before if what == "x" else found.after
            assert cells[4][column] == as_text(known(told), 2)
        dots = browser.run(f"[...{place}.querySelectorAll('svg')].map(s => s.innerHTML.match(/h0/g).length)")
        assert dots == [seasons[at].x.numel() for at, _ in panels]
    assert browser.complaints() == []


def known(value: float | None) -> float:
    assert value is not None
    return value
