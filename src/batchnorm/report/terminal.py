"""Terminals: a document as rich renderables, readable at 80 columns and in a pipe."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from rich.box import HEAVY_HEAD, ROUNDED
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text

from batchnorm.report.document import (
    Block,
    Document,
    Figure,
    Formula,
    Paragraph,
    Question,
    Section,
    Slider,
    Table,
    Verdict,
)

__all__ = ["render", "render_section", "sparkline"]

_STYLE = {"good": "bold green", "bad": "bold red", "neutral": "bold"}
_MARK = {"good": "+", "bad": "!", "neutral": "·"}
_LEVELS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 32
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def render(document: Document, *, folded: bool = False, brief: bool = False) -> RenderableType:
    """Return a document as something that `rich.console.Console.print` draws.

    Args:
        document: what to show.
        folded: also show the sections that are folded in a browser.
        brief: the verdict, the first section and the tables only, for where the rest lies in a file.

    Example:
        >>> from rich.console import Console
        >>> from batchnorm.report.document import Document
        >>> Console(width=40).print(render(Document("Report", "It works.", [])))
        ╭─ Report ─────────────────────────────╮
        │ It works.                            │
        ╰──────────────────────────────────────╯
    """
    parts: list[RenderableType] = [_head(document)]
    for number, section in enumerate(document.sections):
        if section.folded and not folded:
            continue
        if brief and number > 0:
            tables = [block for block in section.blocks if isinstance(block, Table)]
            if not tables:
                continue
            section = replace(section, blocks=tables)
        parts.extend(_section(section, titled=number > 0))
    if document.facts and not brief:
        parts.append(Text())
        parts.append(_facts(document.facts))
    return Group(*parts)


def render_section(section: Section) -> RenderableType:
    """Return one section with its title, for a document that is shown step by step.

    Example:
        >>> from rich.console import Console
        >>> from batchnorm.report.document import Formula, Section
        >>> Console(width=60).print(render_section(Section("The mean", [Formula("m", "μ = Σx / n", "6 / 3 = 2")])))
        <BLANKLINE>
        The mean
        <BLANKLINE>
          μ = Σx / n
          6 / 3 = 2
    """
    return Group(*_section(section, titled=True))


def sparkline(values: Sequence[float], low: float, high: float, width: int = _SPARK_WIDTH) -> str:
    """Return `values` as a row of at most `width` bars between `low` and `high`.

    Longer rows are averaged down; a value that is not finite leaves a gap.

    Example:
        >>> sparkline([0.0, 1.0, 2.0, float("nan"), 4.0], 0.0, 4.0)
        '▁▃▅ █'
    """
    size = min(width, len(values))
    bars = []
    for index in range(size):
        start, stop = index * len(values) // size, (index + 1) * len(values) // size
        chunk = [value for value in values[start:stop] if math.isfinite(value)]
        if not chunk:
            bars.append(" ")
            continue
        share = (sum(chunk) / len(chunk) - low) / (high - low) if high > low else 0.0
        level = round(min(max(share, 0.0), 1.0) * (len(_LEVELS) - 1))
        bars.append(_LEVELS[level])
    return "".join(bars)


def _head(document: Document) -> RenderableType:
    text = Text(document.verdict)
    if document.incomplete:
        text.append(f"\n\nIncomplete: {document.incomplete}", style="yellow")
    return Panel(text, title=Text(document.title, style="bold"), title_align="left", box=ROUNDED)


def _section(section: Section, *, titled: bool) -> Iterator[RenderableType]:
    if titled:
        yield Text()
        yield Text(section.title, style="bold underline")
    for is_verdict, blocks in groupby(section.blocks, key=lambda block: isinstance(block, Verdict)):
        yield Text()
        if is_verdict:
            yield _verdicts([block for block in blocks if isinstance(block, Verdict)])
        else:
            for number, block in enumerate(blocks):
                if number:
                    yield Text()
                yield _block(block)
    if questions := [block for block in section.blocks if isinstance(block, Question)]:
        yield from _answers(questions)


def _verdicts(blocks: Sequence[Verdict]) -> RenderableType:
    grid = RichTable.grid(padding=(0, 1))
    grid.add_column(width=1)
    grid.add_column()
    for number, block in enumerate(blocks):
        if number:
            grid.add_row("", "")
        style = _STYLE[block.tone]
        colon = "" if block.label.endswith(("?", ":", "!", ".")) else ":"
        line = Text.assemble(f"{block.label}{colon} ", (block.headline, style))
        grid.add_row(Text(_MARK[block.tone], style=style), Group(line, Text(block.text, style="dim")))
    return grid


def _block(block: Block) -> RenderableType:
    if isinstance(block, Paragraph):
        lead = (f"{block.lead} ", "bold") if block.lead else ""
        return Text.assemble(lead, block.text, style="dim" if block.small else "")
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figure):
        return _Plot(block)
    if isinstance(block, Formula):
        return Padding(Group(Text(block.text, style="bold"), Text(block.numbers)), (0, 0, 0, 2))
    if isinstance(block, Slider):
        return Text(f"{block.label}: {block.text}")
    if isinstance(block, Question):
        return _question(block)
    return _verdicts([block])


def _question(block: Question) -> RenderableType:
    options = [Text(f"  {letter}) {option}") for letter, option in zip(_LETTERS, block.options, strict=False)]
    return Group(Text(block.text), *options)


def _answers(questions: Sequence[Question]) -> Iterator[RenderableType]:
    """The answers below all the questions, so that one may think first."""
    yield Text()
    yield Text("Answers", style="bold")
    for number, block in enumerate(questions, start=1):
        answer = f"{number}. {_LETTERS[block.answer]}) {block.options[block.answer]}. "
        yield Text()
        yield Text.assemble((answer, "bold"), (block.why, "dim"))


def _table(block: Table) -> RenderableType:
    table = RichTable(
        box=HEAVY_HEAD,
        show_edge=False,
        title=Text(block.caption, style="bold") if block.caption else None,
        title_justify="left",
        header_style="bold",
        pad_edge=False,
    )
    for index, column in enumerate(block.columns):
        table.add_column(Text(column), justify="right" if index in block.numeric else "left", overflow="fold")
    for row in block.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _facts(facts: Mapping[str, str]) -> RenderableType:
    grid = RichTable.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(Text(name), Text(value))
    return grid


class _Plot:
    """A figure in words, with a small bar row for each of its curves where the terminal has the glyphs."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.figure.title, style="bold")
        if not options.ascii_only:
            curves = _curves(self.figure)
            if curves:
                yield _sparklines(curves, self.figure.layout)
        yield Padding(Text(self.figure.alt), (0, 0, 0, 2))
        if self.figure.caption:
            yield Padding(Text(self.figure.caption, style="dim"), (0, 0, 0, 2))


@dataclass(frozen=True)
class _Curve:
    name: str
    axis: str
    values: Sequence[float]
    last: str
    ends: tuple[str, str]


def _sparklines(curves: Sequence[_Curve], layout: Mapping[str, Any]) -> RenderableType:
    grid = RichTable.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, overflow="ellipsis", max_width=32)
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, style="dim")
    # Curves that share an axis share a scale, so that their heights can be compared.
    limits: dict[str, tuple[float, float]] = {}
    for curve in curves:
        known = [value for value in curve.values if math.isfinite(value)]
        low, high = limits.get(curve.axis, (math.inf, -math.inf))
        limits[curve.axis] = (min(low, *known), max(high, *known))
    for curve in curves:
        bars = sparkline(curve.values, *limits[curve.axis])
        grid.add_row(Text(curve.name), Text(bars), Text(curve.last))
    legends = [_legend(axis, limits[axis], curves, layout) for axis in limits]
    return Padding(Group(grid, *(Text(line, style="dim") for line in legends)), (0, 0, 0, 2))


def _legend(
    axis: str, limits: tuple[float, float], curves: Sequence[_Curve], layout: Mapping[str, Any]
) -> str:
    """What the lowest and the highest bar stand for, and the first and the last."""
    what, along = _title(layout, f"{axis[0]}axis{axis[1:]}"), _title(layout, f"xaxis{axis[1:]}") or "place"
    ends = {curve.ends for curve in curves if curve.axis == axis}
    low, high = (f"{value:.3g}".replace("-", "−") for value in limits)
    scale = f"{what}: ▁ {low}, █ {high}" if what else f"▁ {low}, █ {high}"
    if len(ends) > 1:
        return f"{scale}; left to right, {along}: from the first to the last"
    ((first, last),) = ends
    return f"{scale}; left to right, {along}: {first} to {last}"


def _title(layout: Mapping[str, Any], axis: str) -> str:
    title = layout.get(axis, {}).get("title", "")
    return str(title.get("text", "")) if isinstance(title, Mapping) else str(title)


def _curves(figure: Figure) -> list[_Curve]:
    """Return every named line of a figure that a bar row can show."""
    curves = []
    for trace in figure.data:
        name, mode = trace.get("name"), str(trace.get("mode", "lines"))
        is_line = trace.get("type", "scatter") == "scatter" and "lines" in mode
        # What has no legend entry is decoration, unless it belongs to another one's: a further panel.
        is_decoration = trace.get("showlegend") is False and "legendgroup" not in trace
        if not (name and is_line) or is_decoration or trace.get("fill"):
            continue
        values = [_number(value) for value in trace.get("y", ())]
        known = [index for index, value in enumerate(values) if math.isfinite(value)]
        if len(values) >= 3 and known:
            places = list(trace.get("x", ())) or list(range(len(values)))
            last = f"{values[known[-1]]:.3g} at {places[known[-1]]}".replace("-", "−")
            ends = (f"{places[0]}", f"{places[-1]}")
            curves.append(_Curve(str(name), str(trace.get("yaxis", "y")), values, last, ends))
    return curves


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
