"""Batches differ from each other more than shuffled batches would.

If samples are drawn at random, the means of batches scatter by sqrt(between / samples). The rule measures how much they
scatter (an analysis of variance over your batches, in eval mode) and speaks where chance is out of the question and the
difference is large: 0.25 σ or more.

Batch norm then takes away what a batch has in common, which may be just what is to be learned: in training every batch
is centred on itself, in eval on the average of all. On the digits sorted by class, test accuracy falls from 96 % to
17 %; rented bikes with one day per batch have five times the error.

## How it comes about

- A DataLoader without `shuffle=True` on data sorted by class, patient, day or file.
- A shuffle buffer that is small against the data (`IterableDataset`, `tf.data`).
- Batches that are one video, one bag, one user on purpose.

## What to do

`DataLoader(..., shuffle=True)`. Recalibrating does not give back what was not learned. Where a batch must be one
source: `batchnorm.convert(model, "renorm")`, or a norm that looks at single samples.

At least four batches are needed, and the rule looks only at layers that have one row per sample. In `batchnorm.watch`
it looks at the model's own input instead, where no weight moves between two batches: pictures in up to 8×8 cells, other
input feature by feature. Batches that differ only in what a network makes of them are for `check`.
"""

from collections.abc import Iterator

from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding
from batchnorm.checks.measures import Scatter, scatter, scatter_of
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN107"]

# In σ, in a tenth of the channels. Digits sorted by class: 0.8; one day of bikes per batch: 0.65. Digits of five
# classes a batch, which cost 2 points of accuracy: 0.28, and not sure.
_EXCESS = 0.25
_RATIO = 2.0


@rule(
    "BN107",
    "batches are not shuffled",
    "warning",
    needs=["model", "batches"],
    reference="https://arxiv.org/abs/1702.03275",
)
def BN107(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """Compare the scatter of batch means with that of independent samples."""
    found = []
    for layer, seen in evidence.observed():
        if not seen.training:
            continue
        measured = scatter(seen, evidence.run)
        if measured is not None and _large(measured):
            found.append((measured, layer.name))
    at_input = scatter_of(evidence.run.inputs)
    if at_input is not None and _large(at_input) and any(seen.training for _, seen in evidence.observed()):
        found.append((at_input, ""))
    if not found:
        return
    worst, name = max(found, key=lambda each: each[0].excess)
    yield self.finding(
        name,
        f"the means of the batches scatter {worst.ratio:.1f} times as much as those of shuffled samples, "
        f"{worst.excess:.1f} σ beyond chance ({worst.batches} batches)",
        cause="samples of a batch have something in common, and batch norm takes it away in training but not in eval",
        fix="DataLoader(..., shuffle=True)",
        also=tuple(each for _, each in found if each != name),
        evidence={"ratio": worst.ratio, "sigma": worst.excess, "certainty": worst.certainty},
    )


def _large(measured: Scatter) -> bool:
    return measured.sure and measured.excess >= _EXCESS and measured.ratio >= _RATIO
