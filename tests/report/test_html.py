import json
import re
import sys
from html.parser import HTMLParser

import pytest

from batchnorm._errors import MissingDependencyError
from batchnorm.report import html
from batchnorm.report.document import COLOURS, Document, Figure, Paragraph, Section, Table, Verdict

EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)>\"'&"


class Page(HTMLParser):
    """What a browser would see: the tags with their attributes, and the text outside scripts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.scripts: dict[str, str] = {}
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            name = self.tags[-1][1].get("id")
            if name:
                self.scripts[name] = self.scripts.get(name, "") + data
        elif self.open and self.open[-1] != "style":
            self.text += data

    def having(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        wanted = attributes.items()
        return [attrs for name, attrs in self.tags if name == tag and wanted <= attrs.items()]


def evil_document() -> Document:
    figure = Figure(
        EVIL, EVIL, [{"name": EVIL, "y": [1, 2]}], {"xaxis": {"title": EVIL}}, alt=EVIL, caption=EVIL
    )
    table = Table([EVIL], [[EVIL]], caption=EVIL)
    blocks = [Verdict(EVIL, EVIL, EVIL), Paragraph(EVIL), table, figure]
    return Document(EVIL, EVIL, [Section(EVIL, blocks), Section(EVIL, [], folded=True)], {EVIL: EVIL}, EVIL)


def test_the_structure_of_a_page(document: Document) -> None:
    page = Page(html.render(document))
    outline = [tag for tag, _ in page.tags if tag in {"h1", "h2", "ul", "figure", "table", "details", "dl"}]
    assert outline == [
        *("h1", "h2", "ul", "figure"),
        *("h2", "figure", "table"),
        *("h2", "figure"),
        *("details", "h2", "figure"),
        *("h2", "dl"),
    ]
    assert len(page.having("th", scope="col")) == 5
    assert len(page.having("th", scope="row")) == 7
    assert not page.open
    assert re.search(r"4\.1× fewer steps\s+70 steps instead", page.text)


def test_every_figure_is_an_image_with_words_and_a_specification(document: Document) -> None:
    page = Page(html.render(document))
    plots = page.having("div", role="img")
    assert [plot["id"] for plot in plots] == [
        "figure-accuracy",
        "figure-rates",
        "figure-footing",
        "figure-rates-2",
    ]
    assert all("atch" in (plot["aria-label"] or "") for plot in plots)
    spec = json.loads(page.scripts["figure-rates-spec"])
    assert spec["data"][1]["y"][-1] is None
    assert spec["data"][0]["line"]["color"] == "with"
    assert page.text.count("With batch norm all seven learning rates train") == 2


def test_ids_are_unique(document: Document) -> None:
    ids = [attrs["id"] for _, attrs in Page(html.render(document, {"a": 1})).tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_nothing_breaks_out() -> None:
    page = Page(html.render(evil_document(), data={"name": EVIL}))
    assert not page.having("img")
    assert page.text.count(EVIL) >= 12
    (spec,) = (json.loads(text) for name, text in page.scripts.items() if name.endswith("-spec"))
    assert spec["data"][0]["name"] == EVIL
    assert json.loads(page.scripts["report-data"]) == {"name": EVIL}
    assert "alert" not in " ".join(name for _, attrs in page.tags for name in attrs)
    assert len(page.having("script")) == 4
    assert EVIL not in html.render(evil_document())


def test_nothing_is_loaded(document: Document) -> None:
    page = Page(html.render(document, data={}))
    loaded = [
        attrs[key] for _, attrs in page.tags for key in ("src", "href", "srcset", "data") if key in attrs
    ]
    assert loaded == ["data:,"]
    (policy,) = page.having("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in (policy["content"] or "")
    assert "@import" not in html._asset("page.css")
    assert "url(" not in html._asset("page.css")


def test_plotly_is_inside_where_there_is_a_figure_and_only_there(document: Document) -> None:
    bare = Document("T", "V", [Section("S", [Paragraph("p")])])
    assert len(html.render(document)) > 1_000_000
    assert len(html.render(bare)) < 30_000


@pytest.mark.parametrize("name", COLOURS)
def test_every_colour_has_a_value_for_day_and_night(name: str) -> None:
    assert html._asset("page.css").count(f"  --{name}: ") == 2
    assert f'"{name}"' in html._asset("page.js")


def test_equal_documents_make_equal_pages(document: Document) -> None:
    assert html.render(document, {"a": [1.0]}) == html.render(document, {"a": [1.0]})


def test_the_numbers_are_offered_only_when_given(document: Document) -> None:
    assert 'id="download"' not in html.render(document)
    page = Page(html.render(document, {"loss": float("nan")}))
    assert page.having("button", id="download")
    assert json.loads(page.scripts["report-data"]) == {"loss": None}


def test_a_card_shows_one_short_sentence_and_folds_the_rest() -> None:
    short, long = "It needs 2.2× fewer steps.", "A " + "very " * 40 + "long sentence."
    blocks = [Verdict("a", "b", text) for text in (short, f"{short} {long}", long)]
    page = html.render(Document("T", "V", [Section("S", blocks)]))
    assert page.count(f"<p>{short}</p>") == 2
    assert page.count(f"<summary>More</summary><p>{long}</p>") == 1
    assert page.count(f"<summary>Details</summary><p>{long}</p>") == 1


def test_an_incomplete_report_says_so(document: Document) -> None:
    partial = Document("T", "V", document.sections, incomplete="3 of 7 rates finished.")
    assert "Incomplete. 3 of 7 rates finished." in Page(html.render(partial)).text
    assert "Incomplete" not in Page(html.render(document)).text


def test_a_missing_plotly_is_named_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingDependencyError, match="Run: pip install plotly"):
        html.check_available()


def test_a_fragment_is_small_safe_and_complete(document: Document) -> None:
    text = html.render_fragment(document)
    page = Page(text)
    assert len(text) < 20_000
    assert not page.having("script")
    for part in (
        document.verdict,
        "4.1× fewer steps",
        "94.9 % ± 0.4",
        "all seven learning rates train",
        "41 s",
    ):
        assert part in page.text
    assert not Page(html.render_fragment(evil_document())).having("script")
