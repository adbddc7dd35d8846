"""What a rule is, and the list of them all. A rule is one file in `rules/` whose docstring is its page."""

import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from batchnorm._errors import InputError, message
from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding, Severity

__all__ = ["Need", "Rule", "all_rules", "rule", "rule_named"]

# What a rule cannot do without, beside the layers: a model (not a state dict alone), its graph, batches, ...
Need = Literal["model", "graph", "batches", "optimizer", "averaged", "world_size"]

Find = Callable[[Evidence], Iterator[Finding]]


@dataclass(frozen=True)
class Rule:
    """A code, a title, how bad it usually is, what it needs, and the function that looks."""

    code: str
    title: str
    severity: Severity
    needs: frozenset[Need]
    reference: str
    find: Find
    page: str  # Markdown

    def finding(self, module: str, what: str, *, cause: str, fix: str, **options: Any) -> Finding:
        """A finding of this rule, with its severity unless another one is given."""
        given: dict[str, Any] = {"severity": self.severity, "reference": self.reference, **options}
        return Finding(self.code, module=module, message=what, cause=cause, fix=fix, **given)


def rule(
    code: str, title: str, severity: Severity, *, needs: Iterable[Need] = (), reference: str = ""
) -> Callable[[Callable[[Rule, Evidence], Iterator[Finding]]], Rule]:
    """Make a function of (rule, evidence) a rule; its module's docstring is the rule's page."""

    def made(function: Callable[[Rule, Evidence], Iterator[Finding]]) -> Rule:
        page = inspect.getdoc(inspect.getmodule(function)) or ""

        def find(evidence: Evidence) -> Iterator[Finding]:
            return function(result, evidence)

        result = Rule(code, title, severity, frozenset(needs), reference, find, page)
        return result

    return made


@functools.cache
def all_rules() -> dict[str, Rule]:
    """Every rule by its code, in order."""
    from batchnorm.checks import rules

    found: dict[str, Rule] = {}
    for each in sorted(pkgutil.iter_modules(rules.__path__), key=lambda each: each.name):
        module = importlib.import_module(f"{rules.__name__}.{each.name}")
        for value in vars(module).values():
            if isinstance(value, Rule):
                found[value.code] = value
    return found


def rule_named(code: str) -> Rule:
    """The rule of a code.

    Raises:
        InputError: there is none; the message names those whose codes are like it.
    """
    rules, wanted = all_rules(), code.upper()
    if wanted not in rules:
        begun = [each for each in rules if wanted and each.startswith(wanted)]
        close = begun or difflib.get_close_matches(wanted, rules, n=4, cutoff=0.6)
        raise InputError(
            message(
                "rule",
                got=repr(code),
                expected=f"one of {', '.join(close)}" if close else "the code of a rule, such as BN101",
                fix="`batchnorm rules` lists them.",
            )
        )
    return rules[wanted]


def chosen(select: Iterable[str] | None, ignore: Iterable[str] | None) -> dict[str, Rule]:
    """The rules whose codes begin with one of `select` (all, if None) and with none of `ignore`.

    Raises:
        InputError: a beginning that fits no rule.
    """
    rules = all_rules()
    wanted = tuple(rules) if select is None else _beginnings("select", select)
    unwanted = _beginnings("ignore", ignore or ())
    return {
        code: each
        for code, each in rules.items()
        if code.startswith(wanted) and not (unwanted and code.startswith(unwanted))
    }


def _beginnings(name: str, codes: Iterable[str]) -> tuple[str, ...]:
    given = tuple(code.upper() for code in ((codes,) if isinstance(codes, str) else codes))
    for code in given:
        if not any(known.startswith(code) for known in all_rules()) or not code:
            raise InputError(
                message(
                    name,
                    got=repr(code),
                    expected="codes of rules, or beginnings of them",
                    fix="`batchnorm rules` lists them.",
                )
            )
    return given
