"""The numbers of a layer that a person looks at during training: pure functions of a look."""

from collections.abc import Sequence

import torch
from torch import Tensor

from batchnorm.checks.evidence import Call, Layer
from batchnorm.checks.measures import alive, dead, median, typical, usual_high

__all__ = ["histograms_of", "numbers_of"]


def numbers_of(layer: Layer, calls: Sequence[Call]) -> dict[str, float]:
    """What there is of: mean_gap, mean_gap_high, variance_ratio, gamma, gamma_min, dead, values, nonfinite."""
    found: dict[str, float] = {}
    nonfinite = torch.zeros(layer.channels, dtype=torch.bool)
    if layer.mean is not None and layer.var is not None:
        nonfinite |= ~(layer.mean.isfinite() & layer.var.isfinite())
    if calls:
        nonfinite |= ~torch.stack([call.mean.isfinite() & call.var.isfinite() for call in calls]).all(0)
        found["values"] = float(calls[0].samples * calls[0].positions)
    gap = _gap(layer, calls)
    if gap is not None:
        found["mean_gap"], found["mean_gap_high"] = median(gap.abs()), usual_high(gap.abs())
        found["variance_ratio"] = median(_ratio(layer, calls))
    if layer.weight is not None:
        found["gamma"], found["gamma_min"] = (
            float(layer.weight.abs().mean()),
            float(layer.weight.abs().min()),
        )
    found["dead"] = float(dead(layer).double().mean())
    found["nonfinite"] = float(nonfinite.double().mean())
    # NaN where no channel varies: nothing to draw.
    return {name: value for name, value in found.items() if value == value or name.startswith("gamma")}


def histograms_of(layer: Layer, calls: Sequence[Call]) -> dict[str, Tensor]:
    """Finite values of the channels: gamma, beta, mean_gap in σ with its sign, and log10 of the batch's variance.

    The variance is the running one where no call was seen.
    """
    var = typical(calls)[1] if calls else layer.var
    found = {"gamma": layer.weight, "beta": layer.bias, "mean_gap": _gap(layer, calls)}
    found["log10_variance"] = None if var is None else var[var > 0].log10()
    kept = {name: values[values.isfinite()] for name, values in found.items() if values is not None}
    return {name: values for name, values in kept.items() if values.numel()}


def _gap(layer: Layer, calls: Sequence[Call]) -> Tensor | None:
    """(running mean − batch mean) / σ of the batch, of the channels that vary; NaN for the others."""
    if layer.mean is None or not calls:
        return None
    mean, var, _ = typical(calls)
    return ((layer.mean - mean) / (var + (layer.eps or 0.0)).sqrt()).masked_fill(~alive(var), float("nan"))


def _ratio(layer: Layer, calls: Sequence[Call]) -> Tensor:
    """Running variance over the batch's, of the channels that vary."""
    if layer.var is None:
        raise ValueError("no running statistics")
    var, eps = typical(calls)[1], layer.eps or 0.0
    return ((layer.var + eps) / (var + eps)).masked_fill(~alive(var), float("nan"))
