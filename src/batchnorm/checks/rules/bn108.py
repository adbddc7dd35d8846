"""Channels that varied in training are constant in these batches.

Their running variance, without what is left in it of its start, 1, is not 0, and their weight is not 0, but on this
data they do not change. In training mode such a channel's output is its bias; in eval mode it is what the running
statistics make of the constant.

## How it comes about

- **A feature of the input that never changes here**: a column that is filled with a default, a sensor that is off, a
  one-hot column of a category that does not occur. Where the batch norm stands right on the input this is a warning.
- **Rare values**: a pixel that has ink in one digit of 250, a category of one row in a hundred. These are no fault. A
  feature that is c but for a share p of the samples has a mean m and a variance v with p = (m - c)² / ((m - c)² + v),
  and the rare value is c + (m - c) / p. Where so many samples miss it with a chance of more than 1 %, and other
  features reach such a value, too (|mean| + 3 σ), it is an "info".
- **A feature that is the same for all of a batch and another one in the next** (the day of all rows, the user of all
  frames): in training it is invisible, in eval it is not. A warning, too.
- Inside a network dead channels behind ReLU are common in healthy models, on few images most of all: an "info".

## What to do

Look at these columns of the data. A feature that is constant within batches needs shuffled batches.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from batchnorm.checks.evidence import Evidence, Layer, Seen
from batchnorm.checks.finding import Finding
from batchnorm.checks.measures import without_start
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN108"]

# Against the running variance. Rounding leaves 1e-14 of the square of the mean.
_STILL = 1e-8
_WEIGHT = 1e-3
# Of what is left of the start of the running variance, 1: rounded, it may be more or less.
_LEFT = 0.01
_CHANCE = 0.01  # of seeing nothing but the usual value
_REACH = 3.0  # σ


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
        if not still.any():
            continue
        stepping = int((still & steps).sum())
        odd = still & ~_rare(layer, seen, still)
        if (seen.raw and stepping) or stepping > layer.channels // 10:
            what = f"{stepping} of {layer.channels} channels are constant within each batch, and differ between batches"
            cause = "what is the same in all of a batch is invisible in training, and not in eval"
            fix, severity = "DataLoader(..., shuffle=True)", self.severity
        elif odd.any():
            still = odd if seen.raw else still
            what = _told(layer, still)
            cause = "they varied when the running statistics were made, and have a weight"
            fix = "look at where these numbers come from"
            severity = "warning" if seen.raw else "info"
        else:
            what = _told(layer, still)
            cause = (
                "what they vary by is rare: by the running statistics these batches may well hold none of it"
            )
            fix, severity = "nothing, if that is so", "info"
        yield self.finding(
            layer.name,
            what,
            cause=cause,
            fix=fix,
            severity=severity,
            evidence={"channels": int(still.sum()), "of": layer.channels, "differ": stepping},
        )


def _told(layer: Layer, still: Tensor) -> str:
    count, some = int(still.sum()), still.nonzero().flatten().tolist()[:5]
    listed = ", ".join(map(str, some)) + (" ..." if count > 5 else "")
    return f"{count} of {layer.channels} channels are constant in these batches ({listed})"


def _still(layer: Layer, seen: Seen) -> tuple[Tensor, Tensor]:
    """The channels that do not vary within any batch though they did, and those of them that differ between batches."""
    _, var, left = without_start(layer)
    largest = torch.stack([call.var for call in seen.train]).amax(0)
    means = torch.stack([call.mean for call in seen.train])
    varied = var > max(layer.eps or 0.0, 1e-12, _LEFT * left)
    if layer.weight is not None:
        varied &= layer.weight.abs() > _WEIGHT
    still = varied & (largest <= _STILL * var)
    return still, means.var(0) > 1e-4 * var


def _rare(layer: Layer, seen: Seen, still: Tensor) -> Tensor:
    """The channels that would be constant in as many samples by chance, if what they vary by is one rare value.

    A constant at the running mean would be one of a value that is rare and as far away as one likes; so only values
    that other channels have are believed.
    """
    mean, var, _ = without_start(layer)
    others = (mean.abs() + _REACH * var.clamp(min=0).sqrt())[~still]
    if not others.numel():
        return torch.zeros_like(still)
    usual = torch.stack([call.mean for call in seen.train]).mean(0)
    step = mean - usual
    share = step.square() / (step.square() + var)  # p
    missed = (1 - share) ** sum(call.samples for call in seen.train)
    return still & (missed > _CHANCE) & ((usual + step / share).abs() <= others.nan_to_num(0.0).max())
