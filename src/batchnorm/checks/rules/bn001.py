"""A running mean or a running variance holds NaN or an infinity.

In eval mode every output of these channels is NaN (or constant), and so is all that comes behind them. In training
mode nothing shows: the batch's own statistics are used, and the loss goes on falling.

## How it comes about

One batch whose activations overflowed, or held a NaN, is enough: the update running ← (1 − m)·running + m·batch never
forgets a NaN. Half precision, a learning rate that is too high and broken samples are the usual origins.

## What to do

- `batchnorm.recalibrate(model, loader)` renews the statistics from data; weights need not be touched.
- `batchnorm.convert(model, "batchnorm", nonfinite="skip")` keeps later bad batches out of them.
"""

from collections.abc import Iterator

from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN001"]


@rule(
    "BN001",
    "running statistics are not finite",
    "error",
    reference="https://github.com/pytorch/pytorch/issues/90342",
)
def BN001(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """Count the channels."""
    for layer in evidence.layers:
        if layer.mean is None or layer.var is None:
            continue
        bad = ~(layer.mean.isfinite() & layer.var.isfinite())
        if bad.any():
            count = int(bad.sum())
            yield self.finding(
                layer.name,
                f"{count} of {layer.channels} channels have a running mean or variance that is NaN or infinite",
                cause="one batch with NaN or overflowed activations stays in the running statistics for good",
                fix="batchnorm.recalibrate(model, loader)",
                evidence={"channels": count, "of": layer.channels, "first": int(bad.nonzero()[0])},
            )
