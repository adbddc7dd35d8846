"""What a broken model of the corpus is: a seeded builder, what must be found in it, and what may follow from that."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import batchnorm
from batchnorm.checks.finding import SEVERITIES
from batchnorm.checks.rule import rule_named

__all__ = ["CASES", "Broken", "Case", "broken", "judged"]


@dataclass(frozen=True)
class Broken:
    """A model with a mistake.

    `expected` has the codes that must be found, each with the layer's name, or None where the rule names one layer out
    of many; a finding counts if it is at least as bad as the rule's own severity, or as `severity` says. `follows` has
    codes of further consequences of the same mistake, which may be found or not.
    """

    model: nn.Module | Mapping[str, Any]
    expected: Mapping[str, str | None]
    given: Mapping[str, Any] = field(default_factory=dict)
    follows: tuple[str, ...] = ()
    severity: Mapping[str, str] = field(default_factory=dict)
    during: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass(frozen=True)
class Case:
    """One entry of the corpus; calling it makes the model."""

    name: str
    what: str  # the mistake, in words
    build: Callable[[], Broken]

    def __call__(self) -> Broken:
        torch.manual_seed(0)
        return self.build()


CASES: dict[str, Case] = {}


def broken(build: Callable[[], Broken]) -> Case:
    """Take a builder into the corpus; its docstring says what is wrong."""
    name = build.__name__
    made = Case(name, (build.__doc__ or "").strip(), build)
    CASES[name] = made
    return made


def judged(made: Broken) -> dict[str, Any]:
    """Check the model: what was found of what must be, and what else there is of warning or above."""
    with made.during():
        findings = batchnorm.check(made.model, **made.given)
    found = {
        code: _found(findings, code, layer, made.severity.get(code, rule_named(code).severity))
        for code, layer in made.expected.items()
    }
    others = [
        {"code": each.code, "severity": each.severity, "module": each.module, "message": each.message}
        for each in findings.at_least("warning")
        if each.code not in made.expected
    ]
    return {
        "found": found,
        "follows": sorted({each["code"] for each in others if each["code"] in made.follows}),
        "unexpected": [each for each in others if each["code"] not in made.follows],
    }


def _found(findings: batchnorm.Findings, code: str, layer: str | None, severity: str) -> dict[str, Any]:
    """Whether a rule has said so of this layer, and its words."""
    for each in findings:
        bad_enough = SEVERITIES.index(each.severity) <= SEVERITIES.index(severity)  # type: ignore[arg-type]
        if each.code == code and bad_enough and (layer is None or layer in (each.module, *each.also)):
            return {"found": True, "severity": each.severity, "message": each.message}
    said = [f"{each.severity} at {each.module or 'the model'}" for each in findings if each.code == code]
    return {"found": False, "severity": None, "message": "; ".join(said)}
