"""This machine computes the layer wrongly: a self-test against float64.

A copy of the layer is run on its own device and in its own dtype, in training mode with a gradient, on random numbers
of the shape that your batches give it (a few MB at most). A second copy does the same in float64 on the CPU. Output and
gradient are compared, relative to the largest value.

## How it comes about

Backends have had faults: wrong gradients and outputs on Apple's GPUs (PyTorch issues 134580 and 175189), NaN on AMD's.
Rounding is not meant: errors below 1e-3 in float32, 1e-9 in float64, 0.01 in float16, 0.05 in bfloat16 are usual. A
layer of this package stays far below in float32: 3e-7 on the CPU.

## What to do

Update PyTorch and the driver. Until then the finding names what passed the same test here: `batchnorm.convert(model,
"batchnorm")`, or that with `backend="reference"`, plain PyTorch operators, which is slow. `findings.fix()` puts it in;
where neither passes it leaves the layer. Please report it.
"""

from collections.abc import Iterator

from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN112"]

_FIX = "update PyTorch and the driver"
_UNTIL_THEN = {
    "": "; this package's layers are wrong here, too",
    "batchnorm": '; until then batchnorm.convert(model, "batchnorm"), which is right here',
    "reference": '; until then batchnorm.convert(model, "batchnorm", backend="reference"), which is right here',
}


@rule(
    "BN112",
    "wrong results on this device",
    "error",
    needs=["model", "batches"],
    reference="https://github.com/pytorch/pytorch/issues/134580",
)
def BN112(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """The error of the self-test against what is usual."""
    for layer, seen in evidence.observed():
        if seen.error is None or seen.error_bound is None or seen.error <= seen.error_bound:
            continue
        yield self.finding(
            layer.name,
            f"output or gradient off by {seen.error:.1e} of the largest value in {str(seen.dtype)[6:]}; "
            f"{seen.error_bound:.0e} would be much",
            cause="the batch norm of this device or version computes something else than the same layer in float64",
            fix=_FIX + _UNTIL_THEN[seen.instead],
            evidence={"error": seen.error, "bound": seen.error_bound, "instead": seen.instead},
        )
