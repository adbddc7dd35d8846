"""An averaged model (EMA, SWA) has running statistics of another time than its weights.

An average over `model.parameters()` leaves the buffers alone. The averaged weights move on, the running statistics are
those of the moment when the copy was made, often still 0 and 1, and in eval mode the two do not fit.

Compared are the averaged model's statistics with the model's own. It is a warning if they are still 0 and 1, or if they
are behind in updates and, in the channel in the middle, a quarter of σ or a factor of 1.5 away; it is mentioned (info)
from a tenth of σ or a factor of 1.1. An average whose statistics were set from data is behind in updates, too, but
near: that is no finding.

## How it comes about

A loop of one's own, or a package's, over parameters only. PyTorch's `AveragedModel` copies the buffers of the last
model at every update; this is near enough for an EMA, and not for SWA over a long way.

## What to do

- `batchnorm.recalibrate(averaged, loader)`: exactly the statistics of the averaged weights.
- `batchnorm.averaged(model, decay=0.999)` averages the statistics as it does the weights.
"""

from collections.abc import Iterator

from batchnorm.checks._words import count
from batchnorm.checks.evidence import Evidence, Stale
from batchnorm.checks.finding import Finding, Severity
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN017"]

# Digits, three layers, three seeds, over 10 epochs: averages whose statistics were averaged, copied, or set from data
# are within 0.03 σ and a factor of 1.08 of the model's. An EMA over parameters that started after 3 epochs: up to
# 0.18 σ, 0.5 points of accuracy lost; from the start: 0.3 to 0.9 σ, 5 to 14 points.
_FAR, _NEAR = (0.25, 1.5), (0.1, 1.1)


@rule(
    "BN017",
    "averaged model with stale running statistics",
    "warning",
    needs=["model", "averaged"],
    reference="https://github.com/Lightning-AI/pytorch-lightning/issues/14866",
)
def BN017(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """One finding for the average, at the layer that is farthest."""
    initial = [name for name, stale in evidence.stale.items() if stale.initial]
    if initial:
        yield _told(
            self,
            initial,
            f"running mean and variance of {count(len(initial), 'layer')} are still 0 and 1 in the averaged model",
            severity="warning",
        )
    behind = {
        name: stale for name, stale in evidence.stale.items() if not stale.initial and _behind(stale, _NEAR)
    }
    if behind:
        severity: Severity = "warning" if any(_behind(each, _FAR) for each in behind.values()) else "info"
        names = sorted(behind, key=lambda name: -max(behind[name].distance, behind[name].scale - 1))
        worst = behind[names[0]]
        updates = "" if worst.behind is None else f"{worst.behind:,} updates behind the model's, and "
        yield _told(
            self,
            names,
            f"in the averaged model the running statistics of {count(len(names), 'layer')} are {updates}away from "
            f"them by up to {worst.distance:.2g} σ and a factor of {worst.scale:.2g}",
            severity=severity,
        )


def _told(self: Rule, names: list[str], what: str, severity: Severity) -> Finding:
    return self.finding(
        names[0],
        what,
        cause="the average is taken over parameters, and running statistics are buffers",
        fix="batchnorm.recalibrate(averaged, loader); from the start: batchnorm.averaged(model, decay=...)",
        severity=severity,
        evidence={"layers": names},
        also=tuple(names[1:]),
    )


def _behind(stale: Stale, limits: tuple[float, float]) -> bool:
    far = stale.distance >= limits[0] or stale.scale >= limits[1]
    return far and (stale.behind is None or stale.behind > 0)
