"""Running statistics are still 0 and 1 although the layer is in use.

In eval mode such a layer does not normalize at all: it multiplies by γ and adds β. The network was trained with
the batch's statistics, or with none.

It is taken to be in use if its bias (or, without one, its weight) has moved from where layers start, if batches
have been counted, or if the optimizer has taken steps. A fresh model is no finding, a frozen layer neither:
weights from Caffe come with statistics that are folded into γ and β, and 0 and 1 are right then. Nor is a count
of 0 with statistics that have moved: files of other frameworks have no count.

## How it comes about

- The model was trained in eval mode, or the layer's part of it.
- A checkpoint was loaded without its buffers, or with `strict=False` and other names.
- momentum is 0: every update is thrown away.

## What to do

`batchnorm.recalibrate(model, loader)`: one pass over data, without labels. With momentum 0, set
`layer.momentum = 0.1` first: recalibrate takes a layer with 0 for one that is to stay.
"""

from collections.abc import Iterator

from torch import Tensor

from batchnorm.checks.evidence import Evidence, Layer
from batchnorm.checks.finding import Finding
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN006"]


@rule(
    "BN006",
    "running statistics were never updated",
    "info",
    reference="https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html",
)
def BN006(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """All means 0 and all variances 1, to the bit."""
    for layer in evidence.layers:
        if layer.mean is None or layer.var is None or layer.frozen or not layer.tracks:
            continue
        if (layer.mean != 0).any() or (layer.var != 1).any():
            continue
        if layer.updates:
            why = f"after {layer.updates:,} batches"
        elif _moved(layer):
            why = "although weight and bias have been trained"
        elif evidence.steps:
            why = f"after {evidence.steps:,} steps of the optimizer"
        else:
            continue
        still = layer.momentum == 0
        yield self.finding(
            layer.name,
            f"running mean and variance are still 0 and 1 {why}" + (": momentum is 0" if still else ""),
            cause="momentum=0 throws every update away"
            if still
            else "it was trained in eval mode, or loaded without its buffers",
            fix=("layer.momentum = 0.1, then " if still else "") + "batchnorm.recalibrate(model, loader)",
            evidence={"updates": layer.updates, "steps": evidence.steps},
        )


def _moved(layer: Layer) -> bool:
    """Initial values are one constant; DCGAN's γ are random and its β are 0, so β is asked first."""
    if layer.bias is not None:
        return _varies(layer.bias)
    return layer.weight is not None and _varies(layer.weight)


def _varies(values: Tensor) -> bool:
    first = values[:1]
    return bool((values != first).any() or (values.numel() == 1 and first not in (0, 1)))
