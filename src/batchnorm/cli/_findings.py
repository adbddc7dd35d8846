"""Findings in words: for people in a terminal, and for the annotations of GitHub's workflows."""

import io
from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from batchnorm.checks.rule import rule_named
from batchnorm.checks.telling import places

if TYPE_CHECKING:
    from batchnorm.checks import Finding, Findings

__all__ = ["SEVERITY_STYLES", "github", "render", "text"]

SEVERITY_STYLES = {"error": "bold red", "warning": "bold yellow", "info": "bold cyan"}
_COMMANDS = {"error": "error", "warning": "warning", "info": "notice"}


def render(findings: "Findings") -> RenderableType:
    """The findings of each rule together, the worst first; then how many, and what was not looked at."""
    parts: list[RenderableType] = []
    for (severity, code), found in groupby(findings, key=lambda each: (each.severity, each.code)):
        title = Text.assemble((severity, SEVERITY_STYLES[severity]), " ", (code, "bold"), ": ")
        parts.append(title.append(rule_named(code).title))
        parts += [Padding(_finding(each), (0, 0, 1, 2)) for each in found]
    style = SEVERITY_STYLES[findings[0].severity] if len(findings) else "bold green"
    parts.append(Text(findings.summary, style=style))
    codes = {each.code: None for each in findings}
    if codes:
        first = next(iter(codes))
        parts.append(Text(f"batchnorm explain {first} tells more of {first}, and so of each", style="dim"))
    if missed := _unseen(findings):
        parts.append(Text(f"not looked at: {missed}", style="dim"))
    return Group(*parts)


def text(findings: "Findings") -> str:
    """The same for a file: no colours, 100 columns."""
    console = Console(file=io.StringIO(), width=100, color_system=None, highlight=False)
    with console.capture() as captured:
        console.print(render(findings))
    return captured.get()


def _finding(finding: "Finding") -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    grid.add_row("at", Text(places(finding), style="bold"))
    grid.add_row("seen", Text(finding.message))
    grid.add_row("why", Text(finding.cause))
    grid.add_row("fix", Text(finding.fix, style="green"))
    return grid


def _unseen(findings: "Findings") -> str:
    """What was not looked at, and what it needs, in one line; "" if nothing was left out."""
    said = list(findings.notes)
    groups: dict[str, list[str]] = {}
    for code, why in findings.not_run.items():
        groups.setdefault(_needed(why), []).append(code)
    said += [f"{_rules(codes)} {need}" for need, codes in groups.items()]
    return "; ".join(said)


def _needed(why: str) -> str:
    """What the command line would have to be given; what it has no option for, the function has."""
    if "a model" in why:
        return "(a model: MODULE:FACTORY)"
    if "batches=" in why:
        return "(batches: --data)"
    return f"({why.replace('=', '')}: batchnorm.check in Python)" if "=" in why else f"({why})"


def _rules(codes: list[str]) -> str:
    return ", ".join(codes) if len(codes) <= 3 else f"{len(codes)} rules, {codes[0]} to {codes[-1]}"


def github(findings: "Findings") -> str:
    """One annotation a finding, as GitHub's runners read them from a log."""
    lines = []
    for each in findings:
        title = _escaped(f"{each.code} {rule_named(each.code).title}", _IN_TITLE)
        text = f"{places(each)}: {each.message}. Why: {each.cause}. Fix: {each.fix}"
        lines.append(f"::{_COMMANDS[each.severity]} title={title}::{_escaped(text, _IN_TEXT)}\n")
    return "".join(lines)


# The sign that begins a code comes first.
_IN_TEXT = {"%": "%25", "\r": "%0D", "\n": "%0A"}
_IN_TITLE = {**_IN_TEXT, ":": "%3A", ",": "%2C"}


def _escaped(text: str, codes: Mapping[str, str]) -> str:
    for sign, code in codes.items():
        text = text.replace(sign, code)
    return text
