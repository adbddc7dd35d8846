"""Momentum is the weight of the new batch in PyTorch, and the weight of the old average in TensorFlow, Keras and
JAX.

A momentum of 0.99 copied from there makes the running statistics those of the last batch: eval is then as noisy
as the batches are, and depends on which one came last.

## How it comes about

Numbers taken from a paper or from code for another framework: 0.9 and 0.99 there are 0.1 and 0.01 here.

## What to do

Set `layer.momentum = 0.01`, and renew the statistics: `batchnorm.recalibrate(model, loader)`. `findings.fix()`
sets it to 1 − momentum. A momentum of 1.0 is left to you, for it may be meant, and so is 0.5, which is the same in
both.
"""

from collections.abc import Iterator

from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN004"]

_SUSPICIOUS = 0.5


@rule(
    "BN004",
    "momentum in the other framework's convention",
    "warning",
    needs=["model"],
    reference="https://github.com/huggingface/transformers/issues/19454",
)
def BN004(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """At 0.5 the average is over two batches."""
    for layer in evidence.layers:
        if layer.momentum is None or layer.mean is None or layer.frozen or not layer.tracks:
            continue
        if layer.momentum >= _SUSPICIOUS:
            other, share = 1 - layer.momentum, 100 * layer.momentum
            yield self.finding(
                layer.name,
                f"momentum is {layer.momentum:g}: each batch replaces {share:g} % of the running statistics",
                cause="in PyTorch momentum is the weight of the new batch, elsewhere that of the old average",
                fix=f"layer.momentum = {other:g}, then batchnorm.recalibrate(model, loader)",
                evidence={"momentum": layer.momentum},
            )
