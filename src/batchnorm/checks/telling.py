"""Findings as a report, and rules as data."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from batchnorm.checks._words import count
from batchnorm.checks.finding import SEVERITIES, Finding, Severity
from batchnorm.checks.rule import Need, Rule, all_rules, rule_named
from batchnorm.report import Block, Document, Paragraph, Section, Table, Tone, Verdict

__all__ = [
    "document_of",
    "fix_label",
    "needs",
    "places",
    "rule_as_dict",
    "rules_as_dicts",
    "safe",
    "told",
    "unseen",
]

_TITLES: dict[Severity, str] = {
    "error": "Errors: results are wrong",
    "warning": "Warnings: training or accuracy suffers",
    "info": "Worth knowing",
}
_NEEDS: dict[Need, str] = {
    "graph": "a traceable forward",
    "batches": "batches",
    "optimizer": "the optimizer",
    "averaged": "the averaged model",
    "world_size": "several processes",
}
_TONES: dict[Severity, Tone] = {"error": "bad", "warning": "bad", "info": "neutral"}


def needs(rule: Rule) -> str:
    """What a rule cannot do without; batches and the like come with a model."""
    more = [words for need, words in _NEEDS.items() if need in rule.needs]
    return ", ".join(more) or ("model" if "model" in rule.needs else "model or weights")


def rule_as_dict(rule: Rule) -> dict[str, Any]:
    """A rule and its page as plain data."""
    return {
        "code": rule.code,
        "title": rule.title,
        "severity": rule.severity,
        "needs": sorted(rule.needs),
        "reference": rule.reference,
        "page": rule.page,
    }


def rules_as_dicts() -> list[dict[str, Any]]:
    """All of them, in order."""
    return [rule_as_dict(rule) for rule in all_rules().values()]


def places(finding: Finding, most: int = 3) -> str:
    """Where it was found, in a few words."""
    names = [finding.module or "the model", *finding.also]
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def told(finding: Finding) -> str:
    """A finding in three lines."""
    return f"{finding}\n  why: {finding.cause}\n  {fix_label(finding)}: {finding.fix}"


def fix_label(finding: Finding) -> str:
    """What stands before its fix: also whether `Findings.fix` does it."""
    return f"fix ({safe(finding)})" if finding.mendable else "fix"


def safe(finding: Finding) -> str:
    """Of one that `Findings.fix` mends: so, and what it does not do of the fix, for want of data."""
    rest = "; recalibrate is left to you" if "recalibrate(" in finding.fix else ""
    return f"safe, by findings.fix(){rest}"


def unseen(not_run: Mapping[str, str]) -> list[str]:
    """A line on how many rules lacked what, if any did."""
    counts = Counter(not_run.values())
    said = "; ".join(f"{count(number, 'rule')} without {why}" for why, number in counts.most_common())
    return [f"not looked at: {said}"] if said else []


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
    kind = f"{finding.severity.capitalize()} {finding.code}"
    # What was seen may be long; a page would fold it away in a verdict.
    blocks: list[Block] = [
        Verdict(kind, f"at {places(finding)}", rule.title, _TONES[finding.severity]),
        Paragraph(finding.message, lead="Seen:"),
        Paragraph(finding.cause, lead="Why:"),
        Paragraph(finding.fix, lead=f"{fix_label(finding).capitalize()}:"),
    ]
    if finding.reference:
        blocks.append(Paragraph(finding.reference, small=True))
    return blocks
