"""The page: in the text what it holds, in headless Chromium what it does."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import Browser, open_browser

from batchnorm.explain.page import page as build
from batchnorm.explain.questions import questions
from batchnorm.explain.runners import Settings, season

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


def test_the_pages_script_is_short() -> None:
    import batchnorm.explain

    script = Path(batchnorm.explain.__file__).with_name("templates") / "play.js"
    assert len(script.read_text("utf-8").splitlines()) <= 300


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
        at = season(moved(dict(question.settings)))
        assert f"Now: raw {at.before:.2f}" in browser.run(
            f"{place}.querySelector('.seen .numbers').textContent"
        )
    assert browser.complaints() == []
