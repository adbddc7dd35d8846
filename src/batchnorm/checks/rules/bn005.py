"""An eps that changes the result.

The layer divides by √(variance + eps). eps is meant to prevent a division by 0 and nothing else; it takes part
in the result where

- it is as large as the running variance of a channel: the channel comes out with less than 71 % of the spread
  that it should have, and the same network with another eps is another network. A channel that is constant is
  not counted (BN007 names it), nor is one that γ switches off;
- it differs from the eps of the model's other layers tenfold or more;
- it is 0 or below: a constant channel then gives NaN or an infinity (an error if there is one), and PyTorch
  refuses to train.

## How it comes about

Weights from another framework: PyTorch, JAX and the papers have 1e-5, Keras and TensorFlow 1e-3. A layer that
was made with the default in the middle of a network that was not. Inputs that were never scaled. In a trained
network some small channels are usual: 4 % of MobileNetV2's.

## What to do

Set eps to that with which the weights were trained, `layer.eps = 1e-3`; `batchnorm.from_framework` carries it
over. If the weights were trained with this one, leave it: an eps that is changed afterwards changes the
network.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from batchnorm.checks._words import count, share
from batchnorm.checks.evidence import Evidence, Layer
from batchnorm.checks.finding import Finding, Severity
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN005"]

_UNLIKE = 10.0
_DEAD = 1e-4  # of eps, as in BN007
_OFF = 1e-3  # of the layer's largest γ, as in BN007


@rule(
    "BN005",
    "eps that changes the result",
    "info",
    needs=["model"],
    reference="https://github.com/pytorch/vision/issues/2169",
)
def BN005(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """Zero, too large for the data, unlike the others."""
    layers = [(layer, layer.eps) for layer in evidence.layers if layer.eps is not None]
    yield from _zero(self, layers)
    yield from _small(self, layers)
    yield from _unlike(self, [(layer, eps) for layer, eps in layers if eps > 0])


def _zero(self: Rule, layers: Sequence[tuple[Layer, float]]) -> Iterator[Finding]:
    for layer, eps in layers:
        if eps > 0:
            continue
        lost = 0 if layer.var is None else int((layer.var.isfinite() & (layer.var + eps <= 0)).sum())
        severity: Severity = "error" if lost else "info"
        yield self.finding(
            layer.name,
            f"eps is {eps:g}"
            + (
                f": {lost} of {layer.channels} channels are divided by 0"
                if lost
                else ": nothing keeps it above 0"
            ),
            cause="a channel without variance is divided by √(0 + eps)",
            fix="layer.eps = 1e-5",
            severity=severity,
            evidence={"eps": eps, "channels": lost},
        )


def _small(self: Rule, layers: Sequence[tuple[Layer, float]]) -> Iterator[Finding]:
    small: dict[str, int] = {}
    of = 0
    for layer, eps in layers:
        if layer.var is None or eps <= 0:
            continue
        of += layer.channels
        seen = (layer.var <= eps) & (layer.var > _DEAD * eps)
        if layer.weight is not None:
            seen &= layer.weight.abs() > _OFF * layer.weight.abs().max()
        if seen.any():
            small[layer.name] = int(seen.sum())
    if not small:
        return
    number = sum(small.values())
    worst, *others = sorted(small, key=lambda name: -small[name])
    yield self.finding(
        worst,
        f"in {count(len(small), 'layer')} eps is as large as the running variance of channels, or larger: "
        f"{number:,} of {of:,}, {share(number, of)}",
        cause="their output has at most 71 % of the spread that normalization gives the others",
        fix="nothing, if eps is the one of the training; else layer.eps = that one",
        evidence={"channels": number, "of": of, "layers": small},
        also=tuple(others),
    )


def _unlike(self: Rule, layers: Sequence[tuple[Layer, float]]) -> Iterator[Finding]:
    common = Counter(eps for _, eps in layers).most_common(1)
    for layer, eps in layers:
        usual = common[0][0]
        # Powers of ten are not exact: 1e-3 / 1e-4 is a little less than 10.
        if max(eps / usual, usual / eps) > _UNLIKE * (1 - 1e-9):
            yield self.finding(
                layer.name,
                f"eps is {eps:g}, that of most other layers {usual:g}",
                cause="a layer that was made with another default than the rest",
                fix="nothing, if it was trained so; else layer.eps = that of the training",
                evidence={"eps": eps, "usual": usual},
            )
