import io
import math
import re

import pytest
from rich.console import Console

from batchnorm.report import terminal
from batchnorm.report.document import Document, Figure, Paragraph, Section, Table, Verdict


def drawn(document: Document, width: int = 80, *, encoding: str = "utf-8", folded: bool = False) -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=stream, width=width).print(terminal.render(document, folded=folded))
    stream.flush()
    return raw.getvalue().decode(encoding)


def flat(text: str) -> str:
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


def test_the_verdict_stands_first_and_everything_unfolded_is_there(document: Document) -> None:
    text = flat(drawn(document))
    places = [
        text.index(part) for part in (document.title, document.verdict, "4.1× fewer steps", "Learning rates")
    ]
    assert places == sorted(places)
    assert "94.9 % ± 0.4" in text
    assert "With batch norm all seven learning rates train" in text
    assert "duration 41 s" in text
    assert "Both networks start from" not in text


def test_folded_sections_are_shown_on_demand(document: Document) -> None:
    assert "Both networks start from" in flat(drawn(document, folded=True))


def test_brief_is_the_first_section_and_the_tables(document: Document) -> None:
    raw = io.StringIO()
    Console(file=raw, width=80).print(terminal.render(document, brief=True))
    text = flat(raw.getvalue())
    for part in ("4.1× fewer steps", "passes 90 % after 70 steps", "94.9 % ± 0.4"):
        assert part in text
    for part in ("all seven learning rates train", "In units of σ", "duration", "The distribution"):
        assert part not in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider_than_the_terminal(document: Document, width: int) -> None:
    assert max(len(line) for line in drawn(document, width).splitlines()) <= width


def test_a_pipe_gets_no_escape_codes(document: Document) -> None:
    assert "\x1b" not in drawn(document)


def test_a_terminal_that_is_not_unicode_gets_words_in_place_of_bars() -> None:
    figure = Figure("f", "Loss", [{"name": "loss", "y": [1, 2, 3]}], {}, alt="It rises.")
    text = drawn(Document("T", "V", [Section("S", [figure])]), encoding="ascii")
    assert "It rises." in text
    assert "Loss" in text


def test_text_in_brackets_is_not_taken_for_markup() -> None:
    blocks = [
        Verdict("[bold]label", "[red]head", "[4.2, 6.0]"),
        Paragraph("[/nothing]"),
        Table(["[a]"], [["[b]"]], caption="[c]"),
    ]
    text = drawn(Document("[title]", "[verdict]", [Section("[s]", blocks)], {"[k]": "[v]"}, incomplete="[i]"))
    for part in (
        "[bold]label",
        "[red]head",
        "[4.2, 6.0]",
        "[/nothing]",
        "[a]",
        "[b]",
        "[c]",
        "[k]",
        "[v]",
        "[i]",
    ):
        assert part in text


def test_curves_of_one_axis_share_a_scale() -> None:
    data = [{"name": "low", "y": [0.0, 1.0, 2.0]}, {"name": "high", "y": [6.0, 7.0, 8.0]}]
    text = drawn(Document("T", "V", [Section("S", [Figure("f", "F", data, {}, alt="a")])]))
    assert re.search(r"low +▁▂▃  2 at 2", text)
    assert re.search(r"high +▆▇█  8 at 2", text)
    assert "▁ 0, █ 8; left to right, place: 0 to 2" in text


def test_bars_say_what_lies_at_their_ends() -> None:
    data = [
        {"name": "a", "x": [1, 2, 3], "y": [-1.0, 0.0, 1.0]},
        {"name": "b", "x": [1, 2, 9], "y": [5.0, 6.0, 7.0], "yaxis": "y2", "xaxis": "x2"},
        {"name": "c", "x": [2, 3, 9], "y": [5.0, 6.0, 7.0], "yaxis": "y2", "xaxis": "x2"},
    ]
    layout = {
        "xaxis": {"title": {"text": "day"}},
        "yaxis": {"title": "time, s"},
        "xaxis2": {"title": {"text": "step"}},
    }
    text = drawn(Document("T", "V", [Section("S", [Figure("f", "F", data, layout, alt="a")])]))
    assert "time, s: ▁ −1, █ 1; left to right, day: 1 to 3" in text
    assert "▁ 5, █ 7; left to right, step: from the first to the last" in text


def test_bands_and_scattered_points_get_no_bars(document: Document) -> None:
    text = drawn(document)
    assert text.count("▁") > 0
    assert "before" not in [line.split()[0] for line in text.splitlines() if "▁" in line or "█" in line]


def test_a_sparkline_shows_gaps_and_averages_long_rows() -> None:
    assert terminal.sparkline([0.0, math.nan, 1.0], 0.0, 1.0) == "▁ █"
    assert terminal.sparkline([0.0] * 50 + [1.0] * 50, 0.0, 1.0, width=4) == "▁▁██"
    assert terminal.sparkline([3.0, 3.0], 3.0, 3.0) == "▁▁"
    assert terminal.sparkline([], 0.0, 1.0) == ""
