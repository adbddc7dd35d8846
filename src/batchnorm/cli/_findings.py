"""Findings in words: for people in a terminal, and for the annotations of GitHub's workflows."""

import io
from collections import Counter
from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from batchnorm.checks.rule import rule_named
from batchnorm.checks.telling import fix_label, places, safe

if TYPE_CHECKING:
    from batchnorm.checks import Finding, Findings

__all__ = ["SEVERITY_STYLES", "github", "render", "text", "unseen"]

SEVERITY_STYLES = {"error": "bold red", "warning": "bold yellow", "info": "bold cyan"}
_COMMANDS = {"error": "error", "warning": "warning", "info": "notice"}


def render(findings: "Findings") -> RenderableType:
    """The findings of each rule together, the worst first; then how many, and what was not looked at."""
    parts: list[RenderableType] = []
    for (severity, code), found in groupby(findings, key=lambda each: (each.severity, each.code)):
        title = Text.assemble((severity, SEVERITY_STYLES[severity]), " ", (code, "bold"), ": ")
        parts.append(title.append(rule_named(code).title))
        for each in found:
            parts += [_finding(each), Text()]
    parts.append(Text(findings.summary, style=_summary_style(findings)))
    last = [f"more about a rule: batchnorm explain {findings[0].code}"] if findings else []
    last += [_mended(findings)] if any(each.mendable for each in findings) else []
    last += [f"note: {note}" for note in findings.notes]
    last += [f"not looked at: {unseen(findings.not_run)}"] if findings.not_run else []
    parts.append(_Lines(*(("", line, "dim") for line in last)))
    return Group(*parts)


def _summary_style(findings: "Findings") -> str:
    if findings:
        return SEVERITY_STYLES[findings[0].severity]
    return "bold green" if findings.layers else "bold yellow"


def text(findings: "Findings") -> str:
    """The same for a file: no colours, 100 columns."""
    console = Console(file=io.StringIO(), width=100, color_system=None, highlight=False)
    with console.capture() as captured:
        console.print(render(findings))
    return captured.get()


class _Lines:
    """Labelled lines, of which a long one goes on below itself."""

    def __init__(self, *rows: tuple[str, str, str], indent: int = 0) -> None:
        self.rows, self.indent = rows, indent

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(options.max_width - self.indent, 20)
        for label, words, style in self.rows:
            for number, line in enumerate(Text(words, style=style).wrap(console, width)):
                line.rstrip()
                start = "" if number else f"  {label}"
                yield Text.assemble((start.ljust(self.indent)[: self.indent], "dim"), line)


def _finding(finding: "Finding") -> _Lines:
    return _Lines(
        ("at", places(finding), "bold"),
        ("seen", finding.message, ""),
        ("why", finding.cause, ""),
        ("fix", finding.fix, "green"),
        *((("", f"({safe(finding)})", "dim"),) if finding.mendable else ()),
        indent=8,
    )


def _mended(findings: "Findings") -> str:
    """What `Findings.fix` would mend, by rule."""
    codes = ", ".join(sorted({each.code for each in findings if each.mendable}))
    number = sum(each.mendable for each in findings)
    return f"{number} of {len(findings)} can be mended by batchnorm.check(...).fix() in Python: {codes}"


def unseen(not_run: Mapping[str, str]) -> str:
    """How many rules lack what, in the words of the command line."""
    counts = Counter(_needed(why) for why in not_run.values())
    options = sorted(need for need in counts if need.startswith("--"))
    if options:  # one option is one or two rules
        counts[", ".join(options)] = sum(counts.pop(each) for each in options)
    return ", ".join(
        f"{number} rule{'s that need' if number != 1 else ' that needs'} {need}"
        for need, number in counts.most_common()
    )


# By what `Findings.not_run` calls it; what stands first is told of a rule that lacks several.
_OPTIONS = {
    "a model": "a model (MODULE:FACTORY)",
    "batches=": "batches (--data)",
    "averaged=": "--averaged",
    "optimizer=": "--optimizer",
    "world_size=": "--world-size",
}


def _needed(why: str) -> str:
    """What the command line would have to be given."""
    return next((option for need, option in _OPTIONS.items() if need in why), why)


def github(findings: "Findings") -> str:
    """One annotation a finding, as GitHub's runners read them from a log."""
    lines = []
    for each in findings:
        title = _escaped(f"{each.code} {rule_named(each.code).title}", _IN_TITLE)
        text = (
            f"{places(each)}: {each.message}. Why: {each.cause}. {fix_label(each).capitalize()}: {each.fix}"
        )
        lines.append(f"::{_COMMANDS[each.severity]} title={title}::{_escaped(text, _IN_TEXT)}\n")
    return "".join(lines)


# The sign that begins a code comes first.
_IN_TEXT = {"%": "%25", "\r": "%0D", "\n": "%0A"}
_IN_TITLE = {**_IN_TEXT, ":": "%3A", ",": "%2C"}


def _escaped(text: str, codes: Mapping[str, str]) -> str:
    for sign, code in codes.items():
        text = text.replace(sign, code)
    return text
