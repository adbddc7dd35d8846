"""What several rules measure on the calls of a layer: pure functions of evidence."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.checks._words import USUAL_EPS
from batchnorm.checks.evidence import Call, Layer, Run, Seen

__all__ = [
    "ALIVE",
    "Scatter",
    "Sites",
    "alive",
    "apart",
    "calls_of_samples",
    "dead",
    "from_batches",
    "is_fresh",
    "median",
    "outputs_differ",
    "quarter_above",
    "scatter",
    "scatter_of",
    "share_of_data",
    "sites_apart",
    "standard_error",
    "typical",
    "usual_error",
    "usual_high",
    "usual_of",
    "without_start",
]

# A channel whose variance is below this share of the layer's median variance carries nothing that could be compared.
ALIVE = 1e-6
# Between 1e-3 and 1e-6 of the largest MobileNetV2 and EfficientNet-lite0 have 5 channels of 38,064, below that 162:
# what is dead is so by far.
_DEAD = 1e-3
_CONSTANT = 1e-4
# Means beyond chance by so many standard deviations of the test statistic: a chance of 3e-7.
_SIGNIFICANT = 5.0
# A day's temperature, say, is in some of a layer's channels only.
_QUANTILE = 0.9
# Kernels that take differences do not see that one camera is brighter than another: of a first convolution's channels
# half were 0.6 σ apart and a quarter 0.95 σ. Where sources are alike, channels are 0.05 σ apart at most.
_QUARTER = 0.75
# Outputs apart by less than this share of their spread change few decisions. Trained networks on the digits: 0.15 to
# 0.3 with shuffled batches, above 0.8 with sorted ones.
_GAP = 0.3
# And by this much more than where half of a batch's samples are replaced, which is the noise of batch statistics.
_OVER_NOISE = 1.5


def typical(calls: Sequence[Call]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of the calls' means, mean of their variances (as running statistics store them), variance of the means."""
    means = torch.stack([call.mean for call in calls])
    unbiased = torch.stack(
        [call.var * (n / max(1, n - 1)) for call in calls if (n := call.samples * call.positions)]
    )
    between = means.var(0) if len(calls) > 1 else torch.zeros_like(means[0])
    return means.mean(0), unbiased.mean(0), between


def alive(var: Tensor) -> Tensor:
    """Which channels vary at all."""
    finite = var.isfinite() & (var > 0)
    if not finite.any():
        return finite
    return finite & (var > ALIVE * var[finite].median())


def dead(layer: Layer) -> Tensor:
    """Which channels say nothing: their input does not vary, or γ switches them off."""
    ones = torch.ones(layer.channels, dtype=torch.float64)
    gamma = ones if layer.weight is None else layer.weight.abs()
    var = ones if layer.var is None else layer.var.clamp(min=0)
    eps = USUAL_EPS if layer.eps is None else max(layer.eps, 0.0)
    # (a variance of 0 over an eps of 0 is 0 here)
    spread = gamma * (var / (var + eps)).nan_to_num(0.0).sqrt()
    # Where all γ are 0, as residual branches start, none is below the largest.
    constant = (var <= _CONSTANT * eps) | (spread < _DEAD * spread.nan_to_num(0, 0, 0).max())
    return constant & var.isfinite()  # the others are BN001's


def median(values: Tensor) -> float:
    """The median of the finite ones; NaN if there are none."""
    kept = values[values.isfinite()]
    return float(kept.median()) if kept.numel() else float("nan")


def apart(layer: Layer, mean: Tensor, var: Tensor, between: Tensor) -> tuple[Tensor, Tensor]:
    """How far the running mean is off, in σ of the batches' values, and by what factor the variance, per channel.

    The variance is between that of a usual batch and that of all batches together where it is right: the factor is 1
    there. Channels that do not vary are NaN.
    """
    if layer.mean is None or layer.var is None:
        raise ValueError("no running statistics")
    dead = ~alive(var)
    whole = var + between
    sigma = (whole + (layer.eps or 0.0)).sqrt()
    distance = (layer.mean - mean).abs() / sigma
    running, eps = layer.var.clamp(min=0), layer.eps or 0.0
    factor = torch.maximum((running + eps) / (whole + eps), (var + eps) / (running + eps)).clamp(min=1)
    return distance.masked_fill(dead, float("nan")), factor.masked_fill(dead, float("nan"))


def outputs_differ(run: Run) -> bool:
    """Whether the outputs in training and eval mode are apart, by more than the choice of the batch explains."""
    if not run.gap:
        return False
    noise = run.neighbours_train or 0.0
    return statistics.median(run.gap) > max(_GAP, _OVER_NOISE * noise)


def is_fresh(layer: Layer) -> bool:
    """Running statistics that nothing has been put into yet: 0 and 1."""
    if layer.mean is None or layer.var is None:
        return False
    return not layer.updates and bool((layer.mean == 0).all()) and bool((layer.var == 1).all())


def share_of_data(layer: Layer) -> float:
    """How much of the running statistics comes from data, 1 − (1 − m)^updates; the rest is their start, 0 and 1.

    1 for a plain average, and where there was no update: numbers that came from elsewhere.
    """
    if layer.momentum is None or not layer.updates:
        return 1.0
    return float(1 - (1 - min(1.0, layer.momentum)) ** layer.updates)


def without_start(layer: Layer) -> tuple[Tensor, Tensor, float]:
    """Running mean and variance without what is left of their start, 0 and 1, and how much of it was left.

    0 was left, and they are as they are, where that cannot be in them: numbers that came from elsewhere. Without any
    data (a momentum of 0) they are their start, of which nothing stays, or came from elsewhere.
    """
    if layer.mean is None or layer.var is None:
        raise ValueError("no running statistics")
    share = share_of_data(layer)
    left = 1 - share
    if not share and (layer.mean == 0).all() and (layer.var == 1).all():
        return layer.mean, torch.zeros_like(layer.var), left
    # The start's 1 is in every variance.
    if not share or (layer.var < 0.99 * left).any():
        return layer.mean, layer.var, 0.0
    return layer.mean / share, ((layer.var - left) / share).clamp(min=0), left


def calls_of_samples(calls: Sequence[Call], run: Run, site: int = 0) -> list[Call]:
    """The calls at a place in the forward that get one row a sample.

    Frames of a video or regions of an image that are laid out as samples are not independent, and say nothing about
    the batches.
    """
    return [
        call
        for call in calls
        if call.site == site and call.samples == run.batches[call.batch].samples and call.samples > 1
    ]


def standard_error(calls: Sequence[Call], processes: int = 1) -> Tensor:
    """The standard error of a batch's mean, in σ, per channel, for samples that are independent."""
    # A batch's own variance lacks what its mean scatters: between / samples.
    var = torch.stack([call.var + call.between / call.samples for call in calls]).mean(0)
    error = torch.stack([call.between / (call.samples * processes) for call in calls]).mean(0)
    return (error / var).sqrt().masked_fill(~alive(var), float("nan"))


def usual_of(sizes: Sequence[int]) -> int:
    """The size of the usual batch: the last one may be short."""
    return sorted(sizes)[len(sizes) // 2]


def usual_error(calls: Sequence[Call], processes: int = 1) -> Tensor:
    """The same of the usual batch, the median of their sizes: a short one says little, and does not set the error."""
    several = [call for call in calls if call.samples > 1]
    if not several:
        return torch.full_like(calls[0].mean, float("nan"))
    usual = processes * usual_of([call.samples for call in several])
    weights = torch.tensor([call.samples - 1.0 for call in several], dtype=torch.float64)
    weights = weights / weights.sum()
    between = weights @ torch.stack([call.between for call in several])
    var = weights @ torch.stack([call.var + call.between / call.samples for call in several])
    return (between / usual / var).sqrt().masked_fill(~alive(var), float("nan"))


def from_batches(layer: Layer, calls: Sequence[Call]) -> Tensor:
    """How far the running mean is from those of single calls, in their σ, beyond chance (rms), per channel."""
    if layer.mean is None:
        raise ValueError("no running statistics")
    squares = [(layer.mean - call.mean).square() / (call.var + (layer.eps or 0.0)) for call in calls]
    var = torch.stack([call.var for call in calls]).mean(0)
    beyond = torch.stack(squares).mean(0) - standard_error(calls).square()
    return beyond.clamp(min=0).sqrt().masked_fill(~alive(var), float("nan"))


@dataclass(frozen=True)
class Scatter:
    """How much the means of batches scatter: over what shuffled samples give, in σ, and how sure that is."""

    ratio: float  # of standard deviations; 1 for independent samples
    excess: float  # what is beyond chance, in σ of the channel
    certainty: float  # in standard deviations of a normal variable
    batches: int

    @property
    def sure(self) -> bool:
        """Whether chance is out of the question."""
        return self.certainty >= _SIGNIFICANT


def usual_high(values: Tensor) -> float:
    """What a tenth of the finite ones exceed."""
    kept = values[values.isfinite()]
    return float(kept.quantile(_QUANTILE)) if kept.numel() else float("nan")


def scatter(seen: Seen, run: Run) -> Scatter | None:
    """The analysis of variance of sample means by batch: F of the channel that a tenth of the channels exceed.

    In eval mode, where one sample's values do not depend on another's. F is turned into a normal variable by Paulson's
    cube-root approximation (1942). However much the channels depend on each other, the chance that a tenth of them
    exceed a bound is at most ten times the chance of one. None where fewer than four batches can be compared.
    """
    return None if seen.batch_in_eval else scatter_of(calls_of_samples(seen.eval, run))


def scatter_of(calls: Sequence[Call]) -> Scatter | None:
    """The same of any calls that have one row a sample, and in which no sample depends on another."""
    if len(calls) < 4:
        return None
    sizes = torch.tensor([float(call.samples) for call in calls], dtype=torch.float64)
    means = torch.stack([call.mean for call in calls])
    inside = (torch.stack([call.between for call in calls]) * (sizes - 1)[:, None]).sum(0)
    total = sizes.sum()
    grand = (sizes[:, None] * means).sum(0) / total
    d1, d2 = len(calls) - 1, float(total) - len(calls)
    among = (sizes[:, None] * (means - grand).square()).sum(0) / d1
    inside = inside / d2
    var = torch.stack([call.var for call in calls]).mean(0)
    usable = alive(var + among) & (inside > 0)
    if not usable.any():
        return None
    ratios = (among / inside)[usable]
    f = float(ratios.quantile(_QUANTILE))
    size = (float(total) - float(sizes.square().sum()) / float(total)) / d1  # of a usual batch
    extra = ((among - inside).clamp(min=0) / size)[usable]
    sigma = (var[usable] + extra).sqrt()
    root = f ** (1 / 3)
    a, b = 2 / (9 * d1), 2 / (9 * d2)
    certainty = ((1 - b) * root - (1 - a)) / (b * root**2 + a) ** 0.5
    return Scatter(f**0.5, float((extra.sqrt() / sigma).quantile(_QUANTILE)), certainty, len(calls))


@dataclass(frozen=True)
class Sites:
    """How far the inputs of a layer at two places of one forward are apart."""

    first: int
    second: int
    mean: float  # in σ; a quarter of the channels exceed it
    factor: float  # of the variances; a quarter of the channels exceed it
    calls: int  # of the layer in a forward


def sites_apart(seen: Seen) -> Sites | None:
    """The two places that are furthest apart, beyond chance and the same way in every batch.

    None where there is one place, or one batch.
    """
    by_batch: dict[int, dict[int, Call]] = {}
    for call in seen.train:
        by_batch.setdefault(call.batch, {})[call.site] = call
    shared = set.intersection(*(set(each) for each in by_batch.values())) if by_batch else set()
    if len(shared) < 2 or len(by_batch) < 2:
        return None
    found = None
    first = min(shared)
    for second in sorted(shared - {first}):
        pairs = [(each[first], each[second]) for each in by_batch.values()]
        sigma = torch.stack([(a.var + b.var) / 2 for a, b in pairs]).mean(0).sqrt()
        usable = alive(sigma.square())
        if not usable.any():
            continue
        steps = torch.stack([(b.mean - a.mean)[usable] / sigma[usable] for a, b in pairs])
        widths = torch.stack([(b.var / a.var)[usable].log() for a, b in pairs])
        # What chance does to the difference of two means, and to the logarithm of the ratio of two variances.
        chances = [(_of_mean(a) + _of_mean(b))[usable] / sigma[usable].square() for a, b in pairs]
        normal = [2 / max(1, a.samples - 1) + 2 / max(1, b.samples - 1) for a, b in pairs]
        held = _held(steps, torch.stack(chances)), _held(widths, torch.tensor(normal)[:, None])
        mean, width = (quarter_above(each) for each in held)
        each = Sites(first, second, mean, math.exp(width), len(shared))
        if found is None or (each.mean, each.factor) > (found.mean, found.factor):
            found = each
    return found


def quarter_above(values: Tensor) -> float:
    """What a quarter of the finite ones exceed."""
    kept = values[values.isfinite()]
    return float(kept.quantile(_QUARTER)) if kept.numel() else float("nan")


def _of_mean(call: Call) -> Tensor:
    """The variance of a call's mean; as that of a single value, where one sample says nothing of others."""
    return call.between / call.samples if call.samples > 1 else call.var


def _held(differences: Tensor, chances: Tensor) -> Tensor:
    """The smallest of a channel's differences, a row a batch; 0 if some go the other way, or chance may be all of it.

    `chances` are the variances of single differences that independent samples have. Where samples are not independent
    the differences of the batches scatter more, and that counts.
    """
    same = (differences > 0).all(0) | (differences < 0).all(0)
    error = torch.maximum(chances.mean(0), differences.var(0)) / len(differences)
    sure = differences.mean(0).abs() > _SIGNIFICANT * error.sqrt()
    return differences.abs().amin(0) * (same & sure)
