"""In eval mode the network gives other outputs than in training mode, because its running statistics do not fit.

In training mode a batch is normalized by its own mean and variance, in eval mode by the running ones. The two agree
when the running statistics describe what reaches the layer. The rule compares them on your batches: the running mean's
distance is told in σ of the values, the variance as a factor. It speaks only if the outputs of the network differ,
too, by more than the choice of the batch explains.

## How it comes about

The finding names the cause that the numbers support, the most specific first:

- **Too few updates.** Running statistics start at 0 and 1 and keep (1 − m)^updates of that. With a momentum of 0.001
  that is a third after 1,000 updates.
- **Momentum too large.** With 0.9 the running statistics are those of the last batch.
- **Batches that are not shuffled** (BN107): each batch has its own mean, and the average of all fits none.
- **Several sources in one layer** (BN110): the running statistics are a mixture.
- **Momentum too small** for so few updates: the average goes over weights that are long gone. In the first hundred
  updates that holds for every network, and is an "info".
- **Few values per channel** (BN103): every batch's statistics are noise.
- **Pruned weights.** 30 % or more of the weights before a layer are exactly 0, and the batch norms before the first
  such weights still agree with the data. Where there is none before them, the zeros are only mentioned: a network that
  was pruned, trained on, and given samples of another kind looks the same.
- **Weights that were changed afterwards** (averaged, pruned, merged), while the first batch norms still agree with the
  data.

If none of these shows, the samples may simply be of another kind than those of the training. That is worth knowing and
no fault of the model: the finding is an "info" then, however large the gap is. It is one, too, after fewer than five
updates: such a network has not been trained yet.

## What to do

`batchnorm.recalibrate(model, loader)` measures the statistics anew, exactly, with the training data. Nothing else is
touched. Where batches are sorted or mixed, mend that first: the weights were trained under those statistics.
For samples of another kind: `batchnorm.adapt(model, loader)`.
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from batchnorm.checks.evidence import Evidence, Layer, Seen
from batchnorm.checks.finding import Finding, Severity
from batchnorm.checks.measures import (
    Scatter,
    Sites,
    apart,
    from_batches,
    is_fresh,
    median,
    outputs_differ,
    quarter_above,
    scatter,
    share_of_data,
    sites_apart,
    standard_error,
    typical,
    usual_error,
    usual_high,
    without_start,
)
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN101"]

_OFF = 0.25  # σ of the running mean
_FACTOR = 2.0  # of the running variance
_FAST, _FEW = 0.5, 0.95
# How much nearer. A network of 129 updates that keep 68 % of the start: 0.28, as its weights have moved meanwhile.
_NEARER = 0.5
# Taken out of statistics that it is not in, the start throws them 10 times as far off as the data is, and more.
_NONSENSE = 5.0
# The average goes over 1 / momentum updates; where that is more than a tenth of all, early weights are in it. With the
# usual momentum of 0.1 these are the first 100 updates: no training yet.
_SLOW, _USUAL = 10.0, 0.05
_UNTRAINED = 5
_SITES = (0.5, 4.0)  # as BN110 has them
# What the first layers may be off, in σ, where it is the weights that moved, and what a later one must be. In training
# mode every layer gets what the one before it has normalized, so samples of another kind move single layers little:
# at most 0.2 σ and a factor of 2.3 for MobileNetV2 and EfficientNet-lite0 with ImageNet's weights on smoothed noise.
_AGREES, _FAR, _MUCH = 0.15, 1.0, 4.0
# Share of weights that are exactly 0. Training leaves none; the smallest third of normally distributed ones is 2 % of
# their square sum, and what pruning takes in earnest is more.
_ZEROS = 0.3


@rule(
    "BN101",
    "training and eval disagree",
    "warning",
    needs=["model", "batches"],
    reference="https://github.com/pytorch/pytorch/issues/4741",
)
def BN101(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """Compare running statistics with those of training-mode calls, where the outputs differ."""
    if not outputs_differ(evidence.run):
        return
    judged = (
        _state(layer, seen, evidence) for layer, seen in evidence.observed() if _comparable(layer, seen)
    )
    states = [each for each in judged if each is not None]
    off = [each for each in states if each.off]
    if not off:
        return
    worst = max(off, key=lambda each: max(each.mean / _OFF, each.factor / _FACTOR))
    severity, cause, fix = _cause(worst, states, evidence)
    gap = statistics.median(evidence.run.gap)
    yield self.finding(
        worst.layer.name,
        f"running mean {worst.mean:.1f} σ from that of the training batches, variance off by a factor of "
        f"{worst.factor:.1f} (median channel); {_told(gap)}",
        cause=cause,
        fix=fix,
        severity=severity,
        also=tuple(each.layer.name for each in off if each is not worst),
        evidence={"sigma": worst.mean, "factor": worst.factor, "gap": gap, "layers": len(off)},
    )


@dataclass(frozen=True, eq=False)
class _State:
    layer: Layer
    seen: Seen
    mean: float  # σ, the median channel
    factor: float
    off: bool
    scatter: Scatter | None  # of batches that are not shuffled
    sites: Sites | None  # that differ


def _told(gap: float) -> str:
    if gap == float("inf"):
        return (
            "the network's outputs are NaN, infinite or all the same in eval mode, and not in training mode"
        )
    return f"the network's outputs in training and eval mode are {100 * gap:.0f} % of their spread apart"


def _comparable(layer: Layer, seen: Seen) -> bool:
    usable = layer.mean is not None and layer.var is not None and seen.training and not seen.batch_in_eval
    return usable and bool(seen.train) and not is_fresh(layer)


def _state(layer: Layer, seen: Seen, evidence: Evidence) -> _State | None:
    mean, var, between = typical(seen.train)
    distance, factor = (median(values) for values in apart(layer, mean, var, between))
    if distance != distance:  # no channel varies
        return None
    samples = sum(call.samples for call in seen.train)
    # What chance does to an average over so few batches and samples.
    noise = median(standard_error(seen.train)) / len(seen.train) ** 0.5
    off = distance > max(_OFF, 3 * noise) or factor > max(_FACTOR, 1 + 6 * (2 / samples) ** 0.5)
    # Running statistics that fit the average of all calls, and none of them.
    scattered, sites = scatter(seen, evidence.run), sites_apart(seen)
    if scattered is not None and not (scattered.sure and scattered.excess > _OFF):
        scattered = None
    if sites is not None and not (sites.mean > _SITES[0] or sites.factor > _SITES[1]):
        sites = None
    single = from_batches(layer, seen.train)
    if scattered is not None:
        distance = max(distance, usual_high(single))
    elif sites is not None:
        distance = max(distance, quarter_above(single))
    return _State(layer, seen, distance, factor, off or bool(scattered) or bool(sites), scattered, sites)


def _cause(worst: _State, states: list[_State], evidence: Evidence) -> tuple[Severity, str, str]:
    """How bad, why, and what to do: the first that the evidence supports."""
    layer, renew = worst.layer, "batchnorm.recalibrate(model, loader)"
    momentum, updates = layer.momentum, layer.updates or 0
    share = share_of_data(layer)
    if share < _FEW and _start_shows(worst, share):
        return (
            "info" if updates < _UNTRAINED else "warning",
            f"too few updates: after {updates} with momentum {momentum:g}, {100 * (1 - share):.0f} % of the running "
            "statistics are still their start, 0 and 1",
            renew,
        )
    if momentum is not None and momentum >= _FAST and updates:
        fix = f"layer.momentum = {max(0.01, round(1 - momentum, 6)):g}, then {renew}"
        return "warning", f"momentum {momentum:g}: the running statistics are those of the last batches", fix
    scattered = [(each.scatter.excess, each.layer.name) for each in states if each.scatter is not None]
    if scattered:
        excess, name = max(scattered)
        return (
            "warning",
            f"the batches are not shuffled (BN107): their means scatter by {excess:.1f} σ beyond chance at "
            f"{name or 'the model'}, and running statistics fit none of them",
            f"DataLoader(..., shuffle=True), then {renew}",
        )
    if worst.sites is not None:
        return (
            "warning",
            f"the layer is fed from {worst.sites.calls} places (BN110) whose means are {worst.sites.mean:.1f} σ and "
            f"variances a factor of {worst.sites.factor:.1f} apart, and its running statistics are their mixture",
            'batchnorm.convert(model, "domain")',
        )
    if momentum is not None and updates and momentum * updates < _SLOW and not _miscounted(worst, share):
        if momentum < _USUAL:
            why = f"momentum {momentum:g} is small for {updates} updates: the average goes over weights that are gone"
            return "warning", why, renew
        why = (
            f"after {updates} updates the weights still move faster than the statistics, as they do at first"
        )
        return "info", why, renew
    error = median(usual_error(worst.seen.train))
    if error > 0.4:
        return (
            "warning",
            f"few values per channel (BN103): the mean of a batch is uncertain by {error:.1f} σ",
            f"larger batches, then {renew}",
        )
    zeros = _zeros(worst, states, evidence)
    if zeros and _agree_before(states, evidence):
        return "warning", f"{zeros} are exactly 0: they were pruned after the statistics were made", renew
    return _moved(worst, states, renew, zeros)


def _pruned(state: _State, evidence: Evidence) -> float:
    """The share of zeros in the weights before a layer, where it is one that pruning leaves."""
    around = evidence.neighbours.get(state.layer.name)
    return around.zeros if around is not None and _ZEROS <= around.zeros < 1 else 0.0


def _zeros(worst: _State, states: list[_State], evidence: Evidence) -> str:
    """In words what was pruned before the worst layer or one before it; "" if nothing."""
    own = _pruned(worst, evidence)
    if own:
        return f"{100 * own:.0f} % of the weights before it"
    before = [each for each in states if each.seen.place < worst.seen.place]
    share, name = max(((_pruned(each, evidence), each.layer.name) for each in before), default=(0.0, ""))
    return f"{100 * share:.0f} % of the weights before {name}" if share else ""


def _agree_before(states: list[_State], evidence: Evidence) -> bool:
    """Whether there are batch norms before the first pruned weights, and all of them agree with the samples."""
    first = min((each.seen.place for each in states if _pruned(each, evidence)), default=0)
    return _agree([each for each in states if each.seen.place < first])


def _agree(states: list[_State]) -> bool:
    return bool(states) and all(each.mean < _AGREES and not each.off for each in states)


def _moved(worst: _State, states: list[_State], renew: str, zeros: str) -> tuple[Severity, str, str]:
    ordered = sorted(states, key=lambda each: each.seen.place)
    if _agree(ordered[: max(1, len(ordered) // 8)]) and (worst.mean > _FAR or worst.factor > _MUCH):
        return (
            "warning",
            "the first batch norms agree with these samples and this one does not: the weights before it have changed "
            "since (averaged, pruned, merged) or moved faster than the statistics",
            renew,
        )
    return (
        "info",
        "the samples are of another kind than those that made the statistics, or the weights have changed since"
        + (f" ({zeros} are exactly 0)" if zeros else ""),
        f"{renew} with the training data; batchnorm.adapt(model, loader) if it is the data that changed",
    )


def _start_shows(state: _State, share: float) -> bool:
    """Whether the statistics are nearer to what so many updates make of their start and this data than to the data."""
    layer, (mean, var, _) = state.layer, typical(state.seen.train)
    if layer.mean is None or layer.var is None or not without_start(layer)[2]:
        return False
    expected = share * mean, 1 - share + share * var
    from_start = _distance(state, (layer.mean, layer.var), expected)
    return from_start < _NEARER * _distance(state, (layer.mean, layer.var), (mean, var))


def _miscounted(state: _State, share: float) -> bool:
    """Whether the counter was set back: without the start that it would have left, the statistics make no sense."""
    layer, (mean, var, _) = state.layer, typical(state.seen.train)
    if layer.mean is None or layer.var is None or share >= 0.5:
        return False
    cleared_mean, cleared_var, left = without_start(layer)
    cleared = _distance(state, (cleared_mean, cleared_var.clamp(min=1e-12)), (mean, var))
    return not left or cleared > _NONSENSE * _distance(state, (layer.mean, layer.var), (mean, var))


def _distance(state: _State, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """How far two means are apart, in σ of the data, and two variances, as a logarithm: the median channel."""
    var = typical(state.seen.train)[1]
    sigma = (var + (state.layer.eps or 0.0)).sqrt().masked_fill(var <= 0, float("nan"))
    return median((first[0] - second[0]).abs() / sigma + (first[1] / second[1]).log().abs())
