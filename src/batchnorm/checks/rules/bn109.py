"""This batch norm runs faster in another memory layout, or as this package's layer, on this machine.

The one or two costliest layers are timed, forward and backward, with the shape, dtype and layout that your batches give
them: as they are, in channels-last, and as this package's layer. Measurements are interleaved and repeated; the rule
speaks where another way is at least 1.5 times as fast, by the median and by the fastest run.

## How it comes about

PyTorch's kernels differ by layout: on the CPU contiguous images take two to three times as long as channels-last ones,
and (N, C) input on a GPU was twelve times slower than it could be for years.

## What to do

What the finding says. A layout is chosen for the whole model and its input, `model.to(memory_format=
torch.channels_last)`; convolutions must like it, too, so time your own step. Where this package's layer alone is the
fastest, `findings.fix()` puts it in.
"""

from collections.abc import Iterator

from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN109"]

_WORTH = 1.5


@rule(
    "BN109",
    "a slow layout or layer on this machine",
    "info",
    needs=["model", "batches"],
    reference="https://github.com/pytorch/pytorch/issues/38915",
)
def BN109(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """What the timing has found."""
    for layer, seen in evidence.observed():
        if seen.slow is not None and seen.slow > _WORTH:
            shape = "×".join(map(str, seen.shape))
            yield self.finding(
                layer.name,
                f"{seen.slow:.1f} times as fast another way, forward and backward of {shape} on this machine",
                cause=f"the fastest way here is {seen.faster}",
                fix=_FIXES[seen.faster],
                evidence={"factor": seen.slow, "shape": list(seen.shape), "faster": seen.faster},
            )


_LAYOUT = "model.to(memory_format=torch.channels_last), and the input, too"
_LAYER = 'batchnorm.convert(model, "batchnorm")'
_FIXES = {
    "channels-last": _LAYOUT,
    "this package's layer": _LAYER,
    "this package's layer in channels-last": f"{_LAYER}; {_LAYOUT}",
}
