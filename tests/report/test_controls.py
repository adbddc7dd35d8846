"""Formulas, sliders and questions: what every renderer makes of them, and what a page lets one do with them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import Browser, open_browser
from rich.console import Console

from batchnorm.report import html, terminal
from batchnorm.report.document import Document, Figure, Formula, Paragraph, Question, Section, Slider
from batchnorm.report.json import document_to_dict

HEAT = Slider("heat", "Heat", 0, 40, 0.5, 30, "°C", digits=1)
EPS = Slider("eps", "Small <number>", -5, 2, 1, -5, log=True)
ASKED = Question("q", "What <now>?", ("Less", "More"), 1, 'Because "so".', {"heat": 12})
LINE = {"type": "scatter", "mode": "lines", "name": "line", "x": [0, 1], "y": [1, 2]}


@pytest.fixture
def document() -> Document:
    return Document(
        "Play",
        "Move it.",
        [
            Section(
                "First",
                [Formula("mean", "μ = Σx / n", "6 / 3 = 2"), Figure("f", "A line", [LINE], {}, "It rises.")],
            ),
            Section("Sliders", [HEAT, EPS]),
            Section("Last", [ASKED, Paragraph("End.", lead="The <very>")]),
        ],
    )


def test_a_slider_says_its_value_with_unit() -> None:
    assert (HEAT.text, EPS.text) == ("30.0 °C", "0.00001")
    assert Slider("a", "a", 0, 3, 1, 2, log=True).text == "100"


def test_a_terminal_shows_settings_and_keeps_the_answers_for_the_end(document: Document) -> None:
    console = Console(width=80)
    with console.capture() as drawn:
        console.print(terminal.render(document))
    text = drawn.get()
    for part in ("μ = Σx / n", "6 / 3 = 2", "Heat: 30.0 °C", "What <now>?", "a) Less", "b) More"):
        assert part in text
    assert text.index("The <very> End.") < text.index("Answers") < text.index('1. b) More. Because "so".')


def test_a_page_holds_the_controls_and_their_script_only_where_there_are_some(document: Document) -> None:
    page = html.render(document, script="const own = '</script>';")
    assert '<aside class="controls" id="sliders" aria-label="Sliders">' in page
    assert page.count('type="range"') == 2
    assert "Small &lt;number&gt;" in page
    assert "data-log" in page
    assert "<strong>The &lt;very&gt;</strong> End." in page
    assert r"const own = '<\/script>';" in page
    plain = html.render(Document("Plain", "Nothing moves.", [Section("One", [Paragraph("Hi.")])]))
    assert "report.settings" not in plain
    assert 'class="controls"' not in plain


def test_a_notebook_gets_words(document: Document) -> None:
    text = html.render_fragment(document)
    assert "<input" not in text
    for part in ("6 / 3 = 2", "Heat: 30.0 °C", "What &lt;now&gt;? More."):
        assert part in text


def test_json_names_every_kind(document: Document) -> None:
    sections = document_to_dict(document)["sections"]
    kinds = [[block["type"] for block in section["blocks"]] for section in sections]
    assert kinds == [["formula", "figure"], ["slider", "slider"], ["question", "paragraph"]]
    assert sections[2]["blocks"][0]["settings"] == {"heat": 12}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    yield from open_browser()


@pytest.mark.browser
def test_scripts_of_a_page_hear_and_redraw(browser: Browser, document: Document, tmp_path: Path) -> None:
    script = """
    document.addEventListener("settings", ({ detail }) => {
      window.heard = detail;
      batchnormReport.redraw("f", [{ y: [0, detail.heat] }]);
    });
    document.addEventListener("question", ({ detail }) => { window.asked = detail.before.heat; });
    """
    path = tmp_path / "play.html"
    path.write_text(html.render(document, {"a": 1}, script), encoding="utf-8")
    browser.look(path)
    browser.drawn(1)
    assert browser.run("batchnormReport.data.a") == 1
    browser.run("batchnormReport.set({ heat: 5 })")
    assert browser.run("batchnormReport.start()") == {"heat": 30, "eps": 1e-05}
    browser.run("document.querySelector('#question-q input').click()")
    browser.run("document.querySelector('#question-q .see').click()")
    assert browser.run("window.heard") == {"heat": 12, "eps": 1e-05}
    assert browser.run("window.asked") == 30  # as the page opened, wherever the slider stood
    assert browser.run("document.querySelector('#slider-heat-value').textContent") == "12.0 °C"
    browser.wait("document.querySelector('#figure-f .canvas').data[0].y[1] === 12")
    browser.theme("dark")  # a redrawn figure keeps its data when the colours change
    browser.wait("getComputedStyle(document.querySelector('.js-line')).stroke === 'rgb(98, 181, 240)'")
    assert browser.run("document.querySelector('#figure-f .canvas').data[0].y[1]") == 12
    assert browser.complaints() == []


@pytest.mark.browser
def test_a_figure_out_of_sight_is_drawn_when_it_comes_near(
    browser: Browser, document: Document, tmp_path: Path
) -> None:
    far = Section("Far", [Paragraph("word " * 4000), Figure("far", "Far", [LINE], {}, "It rises.")])
    path = tmp_path / "far.html"
    path.write_text(html.render(Document("Far", "Far.", [Section("Sliders", [HEAT]), far])), encoding="utf-8")
    browser.look(path)
    browser.drawn(1)
    drawn = "document.querySelector('#figure-far .canvas').data[0].y[1]"
    browser.run("batchnormReport.redraw('far', [{ y: [0, 9] }])")
    browser.run("new Promise(done => setTimeout(done, 200))")
    assert browser.run(drawn) == 2
    browser.run("document.querySelector('#figure-far').scrollIntoView({behavior: 'instant'})")
    browser.wait(f"{drawn} === 9")
