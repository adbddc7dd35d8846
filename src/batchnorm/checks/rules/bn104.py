"""The last batch of an epoch has a single sample.

Behind global pooling or in a table a single sample is one value per channel. It has no variance, and PyTorch stops with
"Expected more than 1 value per channel when training": an error. In front of pooling training goes on, but one image
alone sets the statistics of that step, and its share of the running ones is as large as that of a full batch: an
"info".

## How it comes about

The number of samples is one more than a multiple of the batch size, and the DataLoader keeps what is left over
(`drop_last=False` is the default).

## What to do

- `DataLoader(..., drop_last=True)` for the training.
- Or let the layers bear it: `single="running"` normalizes such a batch by the running statistics.
"""

from collections.abc import Iterator

from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN104"]


@rule(
    "BN104",
    "last batch of one sample",
    "warning",
    needs=["model", "batches"],
    reference="https://github.com/pytorch/pytorch/issues/4534",
)
def BN104(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """What the loader leaves over, and which layers have one value a sample."""
    run = evidence.run
    largest = max((fed.samples for fed in run.batches), default=0)
    trained = [(layer, seen) for layer, seen in evidence.observed() if seen.training and seen.train]
    alone = tuple(
        layer.name
        for layer, seen in trained
        if any(call.positions == 1 and call.samples == run.batches[call.batch].samples for call in seen.train)
    )
    refused = sum(fed.refused for fed in run.batches)
    if refused:
        yield self.finding(
            alone[0] if alone else "",
            f"a batch of one sample: {refused} of {len(run.batches)} batches cannot be trained on",
            cause="one value per channel has no variance: the layer stops with an error in training mode",
            fix='DataLoader(..., drop_last=True), or layers with single="running"',
            severity="error",
            also=alone[1:],
            evidence={"refused": refused, "batches": len(run.batches)},
        )
    elif run.last == 1 and largest > 1 and trained:
        bears = not alone
        yield self.finding(
            trained[0][0].name if bears else alone[0],
            "the last batch has one sample, " + ("one image" if bears else "one value per channel"),
            cause="the statistics of that step are those of a single sample"
            if bears
            else "one value per channel has no variance: training stops there with an error, unless single= is set",
            fix="DataLoader(..., drop_last=True)",
            severity="info" if bears else "warning",
            also=() if bears else alone[1:],
            evidence={"last": 1, "batch": largest},
        )
