"""A report as data: what is said, in order, with no word on how it looks.

A `Document` is built by whoever measured something and drawn by `terminal`, `html` or `json`.
Every block can be drawn by every renderer; a figure is a Plotly specification (plain dictionaries)
with a text alternative for people and terminals that do not see it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "COLOURS",
    "Block",
    "Document",
    "Figure",
    "Paragraph",
    "Section",
    "Table",
    "Tone",
    "Verdict",
    "finite",
]

Tone = Literal["good", "bad", "neutral"]

# The colour names of a figure. A renderer gives each a value that suits its medium and theme.
COLOURS = ("with", "without", "muted", "ink", "with-band", "without-band", "muted-band", "ink-band")


@dataclass(frozen=True)
class Verdict:
    """One judged sentence: `label` is the question, `headline` the answer in a few characters."""

    label: str
    headline: str
    text: str
    tone: Tone = "neutral"


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of plain text; `small` marks method notes and caveats."""

    text: str
    small: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of ready-made strings; `numeric` names the columns that are aligned to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    numeric: Sequence[int] = ()


@dataclass(frozen=True)
class Figure:
    """A Plotly figure as plain data. `alt` says in words what it shows.

    Colours are named, not fixed, so that a renderer can follow the reader's light or dark theme:
    "with", "without", "muted" and "ink", each also with "-band" for a translucent fill.
    """

    id: str
    title: str
    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    alt: str
    caption: str = ""
    height: int = 380


Block = Verdict | Paragraph | Table | Figure


@dataclass(frozen=True)
class Section:
    """A heading and its blocks. `folded` sections open on demand where the medium can fold."""

    title: str
    blocks: Sequence[Block]
    folded: bool = False


@dataclass(frozen=True)
class Document:
    """A whole report. `verdict` is its first sentence; the first section is its first screen."""

    title: str
    verdict: str
    sections: Sequence[Section]
    facts: Mapping[str, str] = field(default_factory=dict)
    incomplete: str = ""


def finite(value: Any) -> Any:
    """`value` with every float that JSON cannot hold (NaN, ±Inf) replaced by None, recursively."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
