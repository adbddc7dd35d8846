"""Running statistics are kept in float16 or bfloat16.

Every batch moves them by momentum · (batch − running). A half type has 11 or 8 significant bits: a step below
half a unit in the last place is lost, and the average stops before it has arrived. With momentum 0.1 it can
stop 0.5 % short in float16 and 4 % in bfloat16, with 0.01 ten times as far. A variance above 65,504 is an
infinity in float16.

A warning where the layer trains. In eval mode, frozen or in a state dict nothing moves any more, and it is only
mentioned (info), unless rounding may have moved a mean by more than a tenth of its σ, or a running variance is
within 10 % of the largest float16.

With `batches`, it is also counted in how many channels the statistics cannot move although they are off by more
than 0.02 σ or 2 %; and it is an error if the batches' variance does not fit float16: the running variance
becomes infinite, and the channels constant.

## How it comes about

`model.half()` and `model.bfloat16()` convert buffers, too. Autocast does not.

## What to do

Keep batch norms in float32: they are fed half precision and return it. `findings.fix()` does that; weight and bias
of PyTorch's layers, which refuse two dtypes, become new parameters in float32, and it says so. Then renew what was
lost: `batchnorm.recalibrate(model, loader)`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from batchnorm.checks._words import USUAL_EPS
from batchnorm.checks.evidence import Evidence, Layer, Seen
from batchnorm.checks.finding import Finding, Severity
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN003"]

_NEAR = 0.9 * torch.finfo(torch.float16).max
# Of σ. In bfloat16 the means of MobileNetV2 and EfficientNet-lite0 are rounded by at most 0.04 σ.
_SHIFT = 0.1
_OFF = 0.02  # of σ, and of the variance: what a batch of thousands of values tells from noise


@rule(
    "BN003",
    "running statistics are kept in half precision",
    "warning",
    reference="https://github.com/pytorch/pytorch/issues/115500",
)
def BN003(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """What is said first is the worst."""
    for layer in evidence.layers:
        if layer.kept_in not in (torch.float16, torch.bfloat16) or layer.mean is None or layer.var is None:
            continue
        numbers, seen = (layer.kept_in, layer.mean, layer.var), evidence.seen.get(layer.name)
        kept = str(layer.kept_in).removeprefix("torch.")
        moves = bool(layer.training) and layer.tracks
        found = {"dtype": kept, **_standing(layer, *numbers), **_moving(layer, *numbers, seen)}
        severity: Severity = "warning" if moves else "info"
        said = "an update below half a unit in the last place is lost"
        if found["rounded"] > _SHIFT:
            severity, said = "warning", f"rounding moves a mean by up to {found['rounded']:.2g} σ"
        if found["near"]:
            severity, said = (
                "warning",
                f"{found['near']} running variances are near 65504 or above, its largest",
            )
        if found.get("stuck"):
            severity = "warning"
            said = f"on these batches {found['stuck']} of {layer.channels} channels are off and cannot move"
        if found.get("overflows"):
            severity = "error"
            said = (
                f"the batches' variance does not fit it in {found['overflows']} of {layer.channels} channels"
            )
        yield self.finding(
            layer.name,
            f"running statistics in {kept}: {said}",
            cause="model.half() and model.bfloat16() convert buffers, too; autocast does not",
            fix="findings.fix(), or layer.float(): batch norm takes half precision and returns it",
            severity=severity,
            evidence=found,
        )


def _standing(layer: Layer, dtype: torch.dtype, mean: Tensor, var: Tensor) -> dict[str, Any]:
    """What the present values say: by how many σ a mean may be rounded, and variances near the largest float16."""
    sigma = (var.clamp(min=0) + (USUAL_EPS if layer.eps is None else layer.eps)).sqrt()
    rounded = _half_unit(mean, dtype) / sigma
    near = (var >= _NEAR) & var.isfinite() & (dtype == torch.float16)
    return {"rounded": float(rounded.nan_to_num(0, 0, 0).max()), "near": int(near.sum())}


def _moving(layer: Layer, dtype: torch.dtype, mean: Tensor, var: Tensor, seen: Seen | None) -> dict[str, Any]:
    """In how many channels the batches cannot move the statistics, and in how many their variance is too large."""
    if seen is None or not seen.train or not seen.training or not layer.momentum or layer.frozen:
        return {}
    means = torch.stack([call.mean for call in seen.train])
    counts = [call.samples * call.positions for call in seen.train]
    pairs = zip(seen.train, counts, strict=True)
    variances = torch.stack([call.var * (n / max(1, n - 1)) for call, n in pairs])
    stuck = torch.zeros(layer.channels, dtype=torch.bool)
    for batch, running, unit in ((means, mean, var.clamp(min=0).sqrt()), (variances, var, var)):
        still = (layer.momentum * (batch - running)).abs().max(0).values < _half_unit(running, dtype)
        stuck |= still & ((batch.mean(0) - running).abs() > _OFF * unit)
    large = variances.mean(0) > torch.finfo(dtype).max
    return {"stuck": int(stuck.sum()), "overflows": int(large.sum())}


def _half_unit(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place that these values have in a dtype."""
    info = torch.finfo(dtype)
    unit = torch.ldexp(torch.full_like(values, info.eps / 4), torch.frexp(values).exponent)
    # Of 0 and of subnormal numbers the smallest there is.
    return torch.where(values == 0, 0.0, unit).clamp(min=info.smallest_normal * info.eps / 2)
