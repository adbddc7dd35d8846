"""momentum=None: the running statistics are the plain average over all batches since the beginning.

The nth batch counts 1/n. That is what one wants of a pass with fixed weights. In training the weights move, and the
average still holds what the layer saw when they were random: after 1,000 batches the first 100 are a tenth of it.

Reported if 1,000 batches have been counted, or if the model is compiled and the layer is PyTorch's: it divides by the
count, a value that the compiler does not know, and `fullgraph=True` fails. This package's layers compile.

## What to do

- `layer.momentum = 0.1` for training; then `batchnorm.recalibrate(model, loader)` where exact statistics are wanted.
- For `torch.compile`: `batchnorm.convert(model, "batchnorm")`.

`findings.fix()` does the one or the other; the statistics stay what they are.
"""

from collections.abc import Iterator

from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN015"]

_LONG = 1000  # a pass that sets statistics is shorter: 10³ to 10⁴ samples are enough (arXiv:2105.07576)


@rule(
    "BN015",
    "momentum=None in a long training or compiled",
    "info",
    needs=["model"],
    reference="https://github.com/pytorch/pytorch/issues/100239",
)
def BN015(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """A frozen layer averages nothing."""
    for layer in evidence.layers:
        if not layer.cumulative or layer.mean is None or layer.frozen or not layer.tracks:
            continue
        updates = layer.updates or 0
        if updates >= _LONG:
            yield self.finding(
                layer.name,
                f"momentum=None after {updates:,} batches: the first {updates // 10:,} are a tenth of the statistics",
                cause="the plain average does not forget what the layer saw when the weights were others",
                fix="layer.momentum = 0.1, then batchnorm.recalibrate(model, loader)",
                evidence={"updates": updates},
            )
        elif evidence.compiled and not layer.ours:
            yield self.finding(
                layer.name,
                "momentum=None in a compiled model: PyTorch's layer reads a counter that the compiler does not know",
                cause="the weight of a batch is 1/num_batches_tracked, a value of a tensor",
                fix='batchnorm.convert(model, "batchnorm"), or layer.momentum = 0.1',
                evidence={"compiled": True},
            )
