"""Statistics that a one-pass variance would destroy: a mean of more than 1000 σ.

E[x²] − E[x]² subtracts two numbers that are (mean/σ)² times as large as their difference. In float32, at 1000
σ, the variance is wrong by 4 to 11 %, at 10,000 σ it is negative, or hundreds of times too large. This
package's layers sum deviations and hold up to 10⁷ σ. Other software does not: Flax's default and Keras on
PyTorch compute E[x²] − E[x]², and exporters and accelerators may. From a state dict, eps is taken to be 1e-5.

## How it comes about

Inputs that were never centred, as time stamps, coordinates, temperatures in kelvin; or a channel that is
constant but for noise.

## What to do

Subtract a constant from the input, once, before the network: batch norm takes it out anyway. Stay with layers
that bear it: `batchnorm.convert(model, "batchnorm")`. In healthy networks means are below 12 σ (MobileNetV2
8.9, EfficientNet-lite0 11).
"""

from collections.abc import Iterator

from batchnorm.checks._words import USUAL_EPS
from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN008"]

_FAR = 1e3  # where a float32 one-pass variance is off by some percent: 1000² · 2⁻²⁴ is 0.06


@rule(
    "BN008",
    "mean of more than 1000 σ",
    "info",
    reference="https://doi.org/10.1080/00031305.1983.10483115",
)
def BN008(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """σ with eps: what a variance is wrong by matters beside that."""
    for layer in evidence.layers:
        if layer.mean is None or layer.var is None:
            continue
        eps = USUAL_EPS if layer.eps is None else layer.eps
        far = (layer.mean.abs() / (layer.var + eps).sqrt()).nan_to_num(0, 0, 0)
        number = int((far > _FAR).sum())
        if number:
            yield self.finding(
                layer.name,
                f"{number} of {layer.channels} channels have a mean of more than 1000 σ, up to {float(far.max()):.2g}",
                cause="the input was never centred; E[x²] − E[x]² in float32 is then some percent wrong, or negative",
                fix='batchnorm.convert(model, "batchnorm"), which sums deviations; or centre the input',
                evidence={"channels": number, "of": layer.channels, "largest": float(far.max())},
            )
