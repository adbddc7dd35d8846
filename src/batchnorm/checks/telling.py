"""Findings as a report."""

from collections.abc import Mapping, Sequence

from batchnorm.checks.finding import SEVERITIES, Finding, Severity
from batchnorm.checks.rule import rule_named
from batchnorm.report import Block, Document, Paragraph, Section, Table, Tone, Verdict

__all__ = ["document_of", "places"]

_TITLES: dict[Severity, str] = {
    "error": "Errors: results are wrong",
    "warning": "Warnings: training or accuracy suffers",
    "info": "Worth knowing",
}
_TONES: dict[Severity, Tone] = {"error": "bad", "warning": "bad", "info": "neutral"}


def places(finding: Finding, most: int = 3) -> str:
    """Where it was found, in a few words."""
    names = [finding.module or "the model", *finding.also]
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def document_of(
    findings: Sequence[Finding], summary: str, not_run: Mapping[str, str], notes: Sequence[str]
) -> Document:
    """A section a severity, and one on what was not looked at."""
    sections = [
        Section(
            _TITLES[severity],
            [block for each in findings if each.severity == severity for block in _blocks(each)],
        )
        for severity in SEVERITIES
        if any(each.severity == severity for each in findings)
    ]
    if not findings:
        sections.append(
            Section("Result", [Verdict("batch norm", "healthy", "No rule has found anything.", "good")])
        )
    if notes or not_run:
        blocks: list[Block] = [Paragraph(note, small=True) for note in notes]
        if not_run:
            rows = [(code, rule_named(code).title, why) for code, why in not_run.items()]
            blocks.append(Table(("rule", "looks for", "needs"), rows))
        sections.append(Section("Not looked at", blocks, folded=True))
    return Document("Check of the batch norms", summary, sections)


def _blocks(finding: Finding) -> list[Block]:
    rule = rule_named(finding.code)
    blocks: list[Block] = [
        Verdict(f"{finding.code}: {rule.title}", places(finding), finding.message, _TONES[finding.severity]),
        Paragraph(finding.cause, lead="Why"),
        Paragraph(finding.fix, lead="Fix"),
    ]
    if finding.reference:
        blocks.append(Paragraph(finding.reference, small=True))
    return blocks
