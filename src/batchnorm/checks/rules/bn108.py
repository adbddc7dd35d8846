"""Channels that varied in training are constant in these batches.

Their running variance is not 0 and their weight is not 0, but on this data they do not change. In training mode such a
channel's output is its bias; in eval mode it is what the running statistics make of the constant.

## How it comes about

- **A feature of the input that never changes here**: a column that is filled with a default, a sensor that is off, a
  one-hot column of a category that does not occur. Where the batch norm stands right on the input this is a warning.
- **A feature that is the same for all of a batch and another one in the next** (the day of all rows, the user of all
  frames): in training it is invisible, in eval it is not. A warning, too.
- Inside a network dead channels behind ReLU are common in healthy models, on few images most of all: an "info".

## What to do

Look at these columns of the data. A feature that is constant within batches needs shuffled batches.
"""

from collections.abc import Iterator

import torch

from batchnorm.checks.evidence import Evidence, Layer, Seen
from batchnorm.checks.finding import Finding
from batchnorm.checks.measures import share_of_data
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN108"]

# Against the running variance. Rounding leaves 1e-14 of the square of the mean.
_STILL = 1e-8
_WEIGHT = 1e-3


@rule(
    "BN108",
    "channels that do not vary on this data",
    "warning",
    needs=["model", "batches"],
    reference="https://arxiv.org/abs/1502.03167",
)
def BN108(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """Variances of training-mode calls against the running ones."""
    for layer, seen in evidence.observed():
        calls = [call for call in seen.train if call.samples * call.positions > 1]
        if layer.mean is None or layer.var is None or not seen.training or len(calls) < 2:
            continue
        still, steps = _still(layer, seen)
        count = int(still.sum())
        if not count:
            continue
        stepping = int((still & steps).sum())
        listed = ", ".join(map(str, still.nonzero().flatten().tolist()[:5])) + (" ..." if count > 5 else "")
        if (seen.raw and stepping) or stepping > layer.channels // 10:
            what = f"{stepping} of {layer.channels} channels are constant within each batch, and differ between batches"
            cause = "what is the same in all of a batch is invisible in training, and not in eval"
            fix, severity = "DataLoader(..., shuffle=True)", self.severity
        else:
            what = f"{count} of {layer.channels} channels are constant in these batches ({listed})"
            cause = "they varied when the running statistics were made, and have a weight"
            fix = "look at where these numbers come from"
            severity = "warning" if seen.raw else "info"
        yield self.finding(
            layer.name,
            what,
            cause=cause,
            fix=fix,
            severity=severity,
            evidence={"channels": count, "of": layer.channels, "differ": stepping},
        )


def _still(layer: Layer, seen: Seen) -> tuple[torch.Tensor, torch.Tensor]:
    """The channels that do not vary within any batch though they did, and those of them that differ between batches."""
    if layer.mean is None or layer.var is None:
        raise ValueError("no running statistics")
    largest = torch.stack([call.var for call in seen.train]).amax(0)
    means = torch.stack([call.mean for call in seen.train])
    eps = layer.eps or 0.0
    # Beyond what is left in it of the 1 that a running variance starts at.
    varied = layer.var - (1 - share_of_data(layer)) > max(eps, 1e-12)
    if layer.weight is not None:
        varied &= layer.weight.abs() > _WEIGHT
    still = varied & (largest <= _STILL * layer.var)
    return still, means.var(0) > 1e-4 * layer.var
