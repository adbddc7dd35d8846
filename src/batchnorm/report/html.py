"""HTML: one self-contained page, or a small fragment for notebooks.

The page carries its styles, its scripts and plotly.js, and a content security policy that forbids
every request, so it looks the same on a laptop without a network in ten years. Figures travel as
JSON beside the text; the page's script draws them in the colours of the reader's theme. Without
scripts each figure's text alternative stands in its place.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from batchnorm._files import require
from batchnorm.report.document import Block, Document, Figure, Question, Section, Slider, Verdict, finite
from batchnorm.report.json import plain

__all__ = ["check_available", "render", "render_fragment"]

_TEMPLATES = Path(__file__).with_name("templates")
# Characters: about six lines of a card when four stand side by side.
_CARD_LIMIT = 150


def check_available() -> None:
    """Raise `MissingDependencyError` now if a page with figures could not be rendered later."""
    require("plotly.offline", package="plotly", purpose="an HTML report")


def render(document: Document, data: Mapping[str, Any] | None = None, script: str = "") -> str:
    """Return a document as one HTML page that needs no other file and no network.

    Args:
        document: what to show.
        data: the numbers behind it; when given, the page carries them and offers them as a
            JSON download.
        script: JavaScript of the caller's own, run after the page's. `batchnormReport` has `data` (the numbers),
            `settings()`, `start()` and `set(values)` of the sliders (as they stand, as the page opened, and new ones),
            `redraw(id, data)` of a figure, and tells of a moved slider or an answered question by the events
            "settings" and "question" of the document.

    Raises:
        MissingDependencyError: plotly is not installed and the document holds a figure.

    Example:
        >>> from batchnorm.report.document import Document, Paragraph, Section
        >>> page = render(Document("A <b> report", "It works.", [Section("One", [Paragraph("Hi.")])]))
        >>> "<title>A &lt;b&gt; report</title>" in page
        True
    """
    sections = _prepare(document)
    template = _environment().get_template("page.html.j2")
    return template.render(
        document=document,
        sections=sections,
        data=None if data is None else finite(data),
        css=_asset("page.css"),
        script=_asset("page.js"),
        controls=_asset("controls.js") if _is_moved(document) else None,
        own_script=Markup(_safe(script)),
        plotly=_plotly() if any(section["has_figure"] for section in sections) else None,
    )


def _is_moved(document: Document) -> bool:
    blocks = (block for section in document.sections for block in section.blocks)
    return any(isinstance(block, Slider | Question) for block in blocks)


def render_fragment(document: Document) -> str:
    """Return a document as a small piece of HTML without scripts, for `_repr_html_`.

    Figures appear as their title and text alternative.

    Example:
        >>> from batchnorm.report.document import Document
        >>> "It works." in render_fragment(Document("Report", "It works.", []))
        True
    """
    template = _environment().get_template("fragment.html.j2")
    return template.render(document=document, sections=_prepare(document), css=_asset("fragment.css"))


def _prepare(document: Document) -> list[dict[str, Any]]:
    """Give every section and figure a unique id, and gather neighbouring verdicts into one group."""
    taken: set[str] = set()
    return [_prepare_section(section, taken) for section in document.sections]


def _prepare_section(section: Section, taken: set[str]) -> dict[str, Any]:
    name = _unique(section.title, taken)
    groups: list[dict[str, Any]] = []
    for block in section.blocks:
        if isinstance(block, Verdict) and groups and groups[-1]["kind"] == "verdicts":
            groups[-1]["blocks"].append(block)
        else:
            groups.append(_group(block, taken))
    return {
        "id": name,
        "title": section.title,
        "folded": section.folded,
        "groups": groups,
        "controls": bool(section.blocks) and all(isinstance(block, Slider) for block in section.blocks),
        "has_figure": any(isinstance(block, Figure) for block in section.blocks),
    }


def _group(block: Block, taken: set[str]) -> dict[str, Any]:
    if isinstance(block, Verdict):
        return {"kind": "verdicts", "blocks": [block]}
    group: dict[str, Any] = {"kind": type(block).__name__.lower(), "block": block}
    if isinstance(block, Figure):
        group["id"] = _unique(f"figure-{block.id}", taken)
        group["spec"] = finite({"data": block.data, "layout": block.layout})
    return group


def _unique(text: str, taken: set[str]) -> str:
    """Return an id made of the letters and digits of `text` that is not yet in `taken`, and note it."""
    base = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "section"
    name, number = base, 2
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    taken.add(name)
    return name


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["first_sentence"] = first_sentence
    environment.policies["json.dumps_kwargs"] = {
        "allow_nan": False,
        "default": plain,
        "separators": (",", ":"),
    }
    return environment


def first_sentence(text: str) -> tuple[str, str]:
    """Return the first sentence of `text`, and the rest: a card shows the one and folds the other.

    A sentence that would fill the first screen is folded too.

    Example:
        >>> first_sentence("At 0.1 it needs 2.2× fewer steps. With 99 % of the best, 3.1×. At 1 none.")
        ('At 0.1 it needs 2.2× fewer steps.', 'With 99 % of the best, 3.1×. At 1 none.')
    """
    first, *rest = re.split(r"(?<=[.!?])\s+(?=[A-Z0-9])", text, maxsplit=1)
    if len(first) > _CARD_LIMIT:
        return "", text
    return first, rest[0] if rest else ""


@functools.cache
def _asset(name: str) -> Markup:
    # The package's own file, not input.
    return Markup((_TEMPLATES / name).read_text(encoding="utf-8"))


@functools.cache
def _plotly() -> Markup:
    offline = require("plotly.offline", package="plotly", purpose="an HTML report")
    source: str = offline.get_plotlyjs()
    return Markup(_safe(source))


def _safe(script: str) -> str:
    # A script element ends at the first "</script", even inside a string literal of its code.
    return re.sub(r"</(script)", r"<\\/\1", script, flags=re.IGNORECASE)
