"""The live table in a terminal: a row a layer, the worst first, what was found below, and room for a progress bar."""

import re
import sys
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, ClassVar

from batchnorm._files import require
from batchnorm.checks.live.judging import Told
from batchnorm.checks.live.pace import Pace
from batchnorm.checks.telling import places

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["LiveTable", "drawn"]

_STYLES = {"error": "bold red", "warning": "bold yellow", "info": "cyan"}
_FINDINGS = 6  # in words; the others are counted
_AROUND = 9  # lines of title, head, rules, foot and progress bar
_FEW = 3  # rows are shown however low the terminal is

Numbers = Mapping[str, Mapping[str, float]]


class LiveTable:
    """Drawn on stderr, anew at every look. What the loop prints meanwhile scrolls by above it.

    It stands before stdout and stderr while it is shown. A line that is written over itself, as a progress bar is,
    stands below the table. A terminal has room for one: another table waits until the first is closed, and says so.
    """

    _in_terminal: ClassVar["LiveTable | None"] = None

    def __init__(self) -> None:
        require("rich", package="rich", purpose="watch's table")
        self._live: Any = None
        self._streams: list[tuple[str, _Above]] = []
        self._below = ""
        self._waits = False
        self._shown: RenderableType | None = None

    def show(
        self, numbers: Numbers, told: Sequence[Told], pace: Pace, title: str, *, ended: bool = False
    ) -> None:
        """Draw it; `ended` for the last time."""
        from rich.console import Console
        from rich.live import Live

        if self._live is None:
            console = Console(file=sys.stderr)
            if console.is_terminal:
                if LiveTable._in_terminal is not None:
                    self._wait(title)
                    return
                LiveTable._in_terminal = self
                console.line()  # a progress bar that was there before may stand in the middle of one
            self._live = Live(
                console=console,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
                vertical_overflow="crop",
            )
            self._live.start()
            for name in ("stdout", "stderr"):
                stream = getattr(sys, name)
                if console.is_terminal and stream is not None and stream.isatty():
                    self._streams.append((name, _Above(stream, self)))
                    setattr(sys, name, self._streams[-1][1])
        self._shown = drawn(numbers, told, pace, title, height=self._live.console.height, ended=ended)
        self._refresh()

    def _wait(self, title: str) -> None:
        if not self._waits:
            print(
                f"{title}: no table while another is shown; close() its watcher, or leave this out: table=False",
                file=sys.stderr,
            )
        self._waits = True

    @property
    def stands(self) -> bool:
        """Whether it is shown."""
        return self._live is not None

    def print_above(self, line: str) -> None:
        """A line of the training loop's."""
        from rich.text import Text

        self._live.console.print(Text.from_ansi(line))

    def put_below(self, line: str) -> None:
        """A line that is not over yet."""
        self._below = line
        self._refresh()

    def _refresh(self) -> None:
        from rich.console import Group
        from rich.text import Text

        if self._live is not None and self._shown is not None:
            below = Text.from_ansi(self._below)
            below.no_wrap, below.overflow = True, "crop"
            self._live.update(Group(self._shown, below), refresh=True)

    def stop(self) -> None:
        """Leave it as it stands, and give the streams back."""
        live, self._live = self._live, None
        if live is None:
            return
        if LiveTable._in_terminal is self:
            LiveTable._in_terminal = None
        if self._shown is not None:
            live.update(self._shown)
        live.stop()
        for name, above in self._streams:
            if getattr(sys, name) is above:
                setattr(sys, name, above.stream)
            above.let_go()
        self._streams.clear()


class _Above:
    """Stands for stdout or stderr: whole lines go above the table, and one that is being written over below it.

    Whoever has kept it (a progress bar, a handler of logging) writes to the stream itself once the table is closed.
    """

    def __init__(self, stream: IO[str], table: LiveTable) -> None:
        self.stream, self._table, self._begun, self._below = stream, table, "", False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def let_go(self) -> None:
        """The table is closed: a line that has been begun goes on behind it."""
        begun, self._begun = self._begun, ""
        if begun:
            self.stream.write(begun)
            self.stream.flush()

    def write(self, text: str) -> int:
        """Text as the loop writes it; a carriage return begins the line anew."""
        if not self._table.stands:
            return self.stream.write(text)
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._table.print_above(_last(line))
        if "\r" in self._begun:
            self._begun = _last(self._begun)
            self._table.put_below(self._begun)
        elif lines and self._below:
            self._table.put_below("")
        self._below = bool(self._begun)
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        """Each as `write` does."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Show the beginning of a line, too."""
        if self._begun and self._table.stands:
            self._table.put_below(self._begun)
        self.stream.flush()


def _last(line: str) -> str:
    """What is left of a line in which the carriage has returned; cursor movements of nested bars are left out."""
    written = [part for part in re.sub(r"\x1b\[\d*[A-HJK]", "", line).split("\r") if part]
    return written[-1] if written else ""


def drawn(
    numbers: Numbers, told: Sequence[Told], pace: Pace, title: str, *, height: int = 40, ended: bool = False
) -> "RenderableType":
    """The table as something that rich draws."""
    from rich.console import Group
    from rich.text import Text

    lines = [_in_words(each) for each in _ordered(told)[:_FINDINGS]]
    if len(told) > _FINDINGS:
        lines.append(Text(f"and {len(told) - _FINDINGS} more", style="dim"))
    rows = max(_FEW, height - _AROUND - len(lines))
    cost = f"{100 * pace.overhead:.1f} % of the training's time"
    foot = f"watching took {cost}" if ended else f"watching takes {cost} · next look at step {pace.next:,}"
    return Group(_table(numbers, told, title, rows), *lines, Text(foot, style="dim", no_wrap=True))


def _table(numbers: Numbers, told: Sequence[Told], title: str, rows: int) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False, padding=(0, 1)
    )
    table.add_column("layer", no_wrap=True, overflow="ellipsis", min_width=8)
    for head in ("mean gap", "variance", "|γ|", "dead", "values"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("findings", no_wrap=True)
    current: dict[str, list[Told]] = {name: [] for name in numbers}
    for each in told:
        for place in each.places & set(current):
            if not each.gone:
                current[place].append(each)
    order = sorted(numbers, key=lambda name: _badness(numbers[name], current[name]), reverse=True)
    # A row is kept for what is left out.
    shown = order if len(order) <= rows else order[: rows - 1]
    for name in shown:
        codes = Text(" ").join(
            Text(each.finding.code, style=_STYLES[each.finding.severity]) for each in current[name]
        )
        table.add_row(Text(name or "model"), *_cells(numbers[name]), codes)
    if len(shown) < len(order):
        table.add_row(Text(f"{len(order) - len(shown)} more layers", style="dim"))
    return table


def _badness(found: Mapping[str, float], told: Sequence[Told]) -> tuple[int, int, float, float]:
    """By severity of what was found there, then by numbers that are none, then by how far the statistics are off."""
    severities = [each.finding.severity for each in told]
    return (
        severities.count("error"),
        severities.count("warning"),
        found.get("nonfinite", 0.0),
        found.get("mean_gap", -1.0),
    )


def _cells(found: Mapping[str, float]) -> list[str]:
    def cell(name: str, form: str) -> str:
        return form.format(found[name]) if name in found else ""

    gamma = cell("gamma", "{:.2f}")
    dead = "" if found.get("dead", 0.0) == 0 else f"{100 * found['dead']:.0f} %"
    ratio = cell("variance_ratio", "× {:.2f}")
    if found.get("nonfinite"):
        ratio = "NaN"
    return [cell("mean_gap", "{:.2f} σ"), ratio, gamma, dead, cell("values", "{:,.0f}")]


def _ordered(told: Sequence[Told]) -> list[Told]:
    """What is there before what has gone, then the worst, then the latest."""
    return sorted(told, key=lambda each: (each.gone, list(_STYLES).index(each.finding.severity), -each.first))


def _in_words(told: Told) -> Any:
    from rich.text import Text

    finding = told.finding
    style = "dim" if told.gone else _STYLES[finding.severity]
    gone = f" (not seen since step {told.last:,})" if told.gone else ""
    return Text.assemble(
        (f"{finding.code} {finding.severity}", style),
        (f" {places(finding, 1)}", "dim" if told.gone else "bold"),
        (f": {finding.message}{gone}", "dim" if told.gone else ""),
        no_wrap=True,
        overflow="ellipsis",
    )
