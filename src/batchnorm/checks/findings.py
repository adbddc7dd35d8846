"""All findings of a check, as a result: text, page, JSON, and the fixes that are safe."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

from batchnorm._errors import ModelError, message
from batchnorm._walk import Changes
from batchnorm.checks.finding import SEVERITIES, Finding, Severity, worst_first
from batchnorm.checks.rule import chosen, rule_named
from batchnorm.checks.telling import document_of, told, unseen
from batchnorm.report import Document, Reported

__all__ = ["Findings"]


class Findings(Reported):
    """What `check` found, the worst first. It is a sequence of `Finding`.

    Attributes:
        findings: every finding.
        layers: how many batch norms were looked at.
        ran: the codes of the rules that had what they need.
        not_run: the codes of the others, each with what it lacked.
        notes: what could not be seen, in words.

    Example:
        >>> import torch, batchnorm
        >>> findings = batchnorm.check(torch.nn.BatchNorm1d(4, momentum=0.9), select=["BN001", "BN004"])
        >>> print(findings)
        model: BN004 warning: momentum is 0.9: each batch replaces 90 % of the running statistics
          why: in PyTorch momentum is the weight of the new batch, elsewhere that of the old average
          fix (safe, by findings.fix(); recalibrate is left to you): layer.momentum = 0.1, then ...
        1 warning: 1 batch norm looked at by 2 rules
        >>> len(findings), findings.at_least("error")
        (1, ())
        >>> round(findings.fix().model.momentum, 3)
        0.1
    """

    kind: ClassVar[str] = "check"
    schema_version: ClassVar[int] = 1

    def __init__(
        self,
        findings: Sequence[Finding],
        *,
        layers: int,
        ran: Sequence[str],
        not_run: dict[str, str],
        notes: Sequence[str],
        repair: Callable[[Sequence[Finding], bool], Changes] | None,
    ) -> None:
        self.findings = worst_first(findings)
        self.layers = layers
        self.ran = tuple(ran)
        self.not_run = not_run
        self.notes = tuple(notes)
        self._repair = repair

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __getitem__(self, index: int) -> Finding:
        return self.findings[index]

    def at_least(self, severity: Severity) -> tuple[Finding, ...]:
        """The findings of this severity and of worse ones."""
        worst = SEVERITIES[: SEVERITIES.index(severity) + 1]
        return tuple(each for each in self.findings if each.severity in worst)

    def __repr__(self) -> str:
        """What a prompt shows."""
        return f"Findings({self.summary})"

    def __str__(self) -> str:
        """Each finding with why and its fix, a line that counts them, and what was not looked at."""
        said = [*map(told, self.findings), self.summary, *(f"note: {note}" for note in self.notes)]
        return "\n".join([*said, *unseen(self.not_run)])

    @property
    def summary(self) -> str:
        """How many of each severity, in how many layers, by how many rules."""
        counts = [
            (sum(each.severity == severity for each in self.findings), severity) for severity in SEVERITIES
        ]
        said = ", ".join(f"{n} {name}{'s' if n != 1 and name != 'info' else ''}" for n, name in counts if n)
        return (
            f"{said or 'nothing found'}: {self.layers} batch norm{'s' if self.layers != 1 else ''} looked at "
            f"by {len(self.ran)} rule{'s' if len(self.ran) != 1 else ''}"
        )

    def fix(
        self,
        select: Iterable[str] | str | None = None,
        *,
        ignore: Iterable[str] | str | None = None,
        inplace: bool = False,
    ) -> Changes:
        """Apply the fixes that are safe, and return what was done.

        A fix is safe if the network computes the same in eval mode afterwards, up to rounding (and, in BN112, up to
        what a device gets wrong), if the names in its state dict stay, if no parameter that an optimizer may hold is
        replaced without a word, and if the finding is gone when `check` runs again. These rules have one: BN003, BN004,
        BN010, BN015, BN016, BN105, BN109 and BN112; their pages say what it does. A finding is `mendable` where it can
        be applied to all of its layers. Everything else is in `skipped`, each layer with the reason and the fix that
        is left to you.

        Wrong to use instead of reading: training may go on differently, which is what most of these fixes are for.

        Args:
            select: codes, or beginnings of codes, of the rules whose findings are mended; all, if not given.
            ignore: codes, or beginnings of codes, of rules whose findings are left alone, and not reported.
            inplace: change the model itself; else a deep copy is changed. Of a model in a wrapper
                (DistributedDataParallel, torch.compile) it is the network inside.

        Returns:
            Changes: `changed` says what was done in each layer, by rule; `skipped` what was not, and why, a
                layer that has been taken out or replaced since the check among them. `revert()` takes all of it back.

        Raises:
            InputError: an unknown rule.
            ModelError: the check was of a state dict; or a part of the model is wrapped for distributed training, or it
                cannot be copied.

        Example:
            >>> import torch, batchnorm
            >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8, momentum=0.99))
            >>> changes = batchnorm.check(net).fix("BN004")
            >>> changes.changed[0].after
            'torch.nn.BatchNorm1d(8, momentum=0.01)'
            >>> changes.changed[0].note
            'BN004: momentum is 0.01 now; left to you: batchnorm.recalibrate(model, loader)'
        """
        rules = chosen(select, ignore)
        if self._repair is None:
            raise ModelError(
                message(
                    "fix", got="a check of a state dict", expected="a check of a model", fix="Pass the model."
                )
            )
        return self._repair([each for each in self.findings if each.code in rules], inplace)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dictionaries and lists."""
        return {
            "summary": self.summary,
            "layers": self.layers,
            "findings": [
                {
                    "code": each.code,
                    "title": rule_named(each.code).title,
                    "severity": each.severity,
                    "module": each.module,
                    "also": list(each.also),
                    "message": each.message,
                    "cause": each.cause,
                    "fix": each.fix,
                    "mendable": each.mendable,
                    "evidence": dict(each.evidence),
                    "reference": each.reference,
                }
                for each in self.findings
            ],
            "ran": list(self.ran),
            "not_run": dict(self.not_run),
            "notes": list(self.notes),
        }

    def document(self) -> Document:
        """The report, ready to be drawn for a terminal or a browser."""
        return document_of(self.findings, self.summary, self.not_run, self.notes)
