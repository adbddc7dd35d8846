"""Padding takes part in the statistics of a batch.

Sequences of different lengths are filled up to the longest one. Batch norm takes the filling for data: mean and
variance move towards it, by how much depends on how long the longest sample of the batch happens to be, and a sample's
result depends on its neighbours' lengths.

The rule looks at (N, C, L) and at (N·L, C): the same vector of channels at the ends of samples, in stretches of
different lengths, and nowhere else. Images are not looked at.

## How it comes about

`pad_sequence`, or a collate function that fills up; text, speech, time series. A filling of 0 is another number
once it has gone through an embedding, a linear layer with a bias or a convolution.

## What to do

Give the layer the mask: this package's layers take `mask=`, of shape (N, L), and leave out what is False, in the
statistics, the output and the gradient. Sorting by length makes the filling less.
"""

from collections.abc import Iterator

from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN106"]

# With a share p of padding at distance d from the mean, the mean moves by p·d: 5 % of padding at 3 σ is 0.15 σ.
_SHARE = 0.05


@rule(
    "BN106",
    "padding in the statistics",
    "warning",
    needs=["model", "batches"],
    reference="https://github.com/pytorch/pytorch/issues/25910",
)
def BN106(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """The share of positions that hold padding."""
    for layer, seen in evidence.observed():
        if seen.training and seen.padding >= _SHARE:
            yield self.finding(
                layer.name,
                f"{100 * seen.padding:.0f} % of the positions are padding, and count as data",
                cause="mean and variance move towards the padding, more in batches with one long sample",
                fix='batchnorm.convert(model, "batchnorm"), then layer(x, mask=mask)',
                evidence={"share": seen.padding},
            )
