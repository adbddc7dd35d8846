"""A report as data: what is said, in order, with no word on how it looks.

A `Document` is built by whoever measured something and drawn by `terminal`, `html` or `json`.
Every block can be drawn by every renderer; a figure is a Plotly specification (plain dictionaries)
with a text alternative for people and terminals that do not see it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

__all__ = [
    "COLOURS",
    "Block",
    "Document",
    "Figure",
    "Formula",
    "Paragraph",
    "Question",
    "Section",
    "Slider",
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
    """A paragraph of plain text; `small` marks method notes and caveats, `lead` is its first sentence, stressed."""

    text: str
    small: bool = False
    lead: str = ""


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


@dataclass(frozen=True)
class Formula:
    """A formula in plain characters, and the same line with numbers put in. A page's script may renew the numbers."""

    id: str
    text: str
    numbers: str


@dataclass(frozen=True)
class Slider:
    """A number that the reader of a page can move; elsewhere, a setting.

    With `log`, `low`, `high`, `step` and `value` are exponents of 10. `digits` is how many decimals are shown.
    A section of sliders alone stands beside the page and stays in sight.
    """

    id: str
    label: str
    low: float
    high: float
    step: float
    value: float
    unit: str = ""
    digits: int = 0
    log: bool = False

    @property
    def text(self) -> str:
        """The value as it is shown, with its unit."""
        number = f"{Decimal(f'{10**self.value:.2g}'):f}" if self.log else f"{self.value:.{self.digits}f}"
        return f"{number} {self.unit}".rstrip()


@dataclass(frozen=True)
class Question:
    """Predict, then see: `answer` is the index of the right option, `why` says what one sees.

    On a page the answer appears once an option is chosen; a script of the page may first move the sliders
    to `settings` (slider id to value).
    """

    id: str
    text: str
    options: Sequence[str]
    answer: int
    why: str
    settings: Mapping[str, float] = field(default_factory=dict)


Block = Verdict | Paragraph | Table | Figure | Formula | Slider | Question


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
