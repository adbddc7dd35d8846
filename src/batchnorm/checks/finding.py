"""One finding: what a rule says about a layer, or about the model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["SEVERITIES", "Finding", "Severity", "worst_first"]

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")  # the worst first


@dataclass(frozen=True)
class Finding:
    """What was found, in units that a person can judge.

    Attributes:
        code: the rule, as "BN101".
        severity: "error": results are wrong; "warning": training or accuracy suffers, on this evidence; "info": worth
            knowing, common in healthy models.
        module: the layer's name in the model; "" for the model as a whole.
        message: what was seen, in one sentence with its numbers.
        cause: why that is bad, or how it comes about, in one sentence.
        fix: one line of code, or what to do where no line does it.
        evidence: the numbers of the message, by name.
        reference: where to read more: a paper, PyTorch's documentation or a thread.
        also: other layers for which the very same holds, folded into this one.
        mendable: whether `findings.fix()` mends it, in every one of its layers.

    Example:
        >>> import torch, batchnorm
        >>> (finding,) = batchnorm.check(torch.nn.BatchNorm1d(4, momentum=0.9))
        >>> finding.code, finding.severity, finding.module, finding.evidence
        ('BN004', 'warning', '', {'momentum': 0.9})
        >>> print(finding.fix)
        layer.momentum = 0.1, then batchnorm.recalibrate(model, loader)
    """

    code: str
    severity: Severity
    module: str
    message: str
    cause: str
    fix: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    reference: str = ""
    also: tuple[str, ...] = ()
    mendable: bool = False

    def __str__(self) -> str:
        """One line."""
        where = self.module or "model"
        more = f" (and {len(self.also)} more)" if self.also else ""
        return f"{where}{more}: {self.code} {self.severity}: {self.message}"


def worst_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """In order of severity, then of code."""
    return tuple(sorted(findings, key=lambda each: (SEVERITIES.index(each.severity), each.code)))
