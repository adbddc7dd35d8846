"""A running variance is negative, which no variance can be.

In eval mode the layer takes the square root of variance + eps. Where that is below 0 the channel's output is
NaN, and so is all that comes behind it; where eps still lifts it above 0, the channel is scaled by a wrong
number. In training mode nothing shows: the batch's own variance is used.

A negative variance below a hundredth of eps is only mentioned (info): it is what rounding leaves of a variance
of 0, and changes the output by less than 1 %. From a state dict, eps is taken to be 1e-5.

## How it comes about

- Checkpoints that were combined with negative weights: differences of models, extrapolation, an average that
  divides by the wrong number.
- A variance computed as E[x²] − E[x]² in single precision.
- A loader that takes the file for an older one whose eps is part of the variance, and subtracts it.
- Statistics that went through a quantized or damaged file.

## What to do

`batchnorm.recalibrate(model, loader)` renews the statistics from data; weights need not be touched. Models are
averaged with `batchnorm.averaged`, and state dicts with `batchnorm.merge_statistics`.
"""

from collections.abc import Iterator

from batchnorm.checks._words import USUAL_EPS
from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding, Severity
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN002"]

_RESIDUE = 0.01  # of eps: sqrt(eps) is 0.5 % off then


@rule(
    "BN002",
    "running variance is negative",
    "error",
    reference="https://github.com/facebookresearch/detectron2/issues/2413",
)
def BN002(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """Infinities are BN001's."""
    for layer in evidence.layers:
        if layer.var is None:
            continue
        bad = layer.var.isfinite() & (layer.var < 0)
        if not bad.any():
            continue
        number, lowest = int(bad.sum()), float(layer.var[bad].min())
        eps = USUAL_EPS if layer.eps is None else layer.eps
        lost = int((bad & (layer.var + eps <= 0)).sum())
        severity: Severity = "info" if lowest > -_RESIDUE * eps else "error"
        said = f"{lost} of them give NaN in eval mode" if lost else "eps keeps them above 0"
        yield self.finding(
            layer.name,
            f"{number} of {layer.channels} channels have a negative running variance, down to {lowest:.2g}; {said}",
            cause="checkpoints combined with negative weights, or a variance computed as E[x²] − E[x]²",
            fix="batchnorm.recalibrate(model, loader)",
            severity=severity,
            evidence={"channels": number, "of": layer.channels, "lowest": lowest, "nan": lost},
        )
