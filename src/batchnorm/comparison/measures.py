"""What is computed from recorded curves and statistics: pure functions of numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchnorm._files import require

__all__ = [
    "CONFIDENCE",
    "Interval",
    "Spread",
    "batch_spread",
    "check_available",
    "clear_guess",
    "first_reach",
    "ratio_interval",
    "rms",
    "t_interval",
    "training_bar",
    "trains",
]

CONFIDENCE = 0.95
_PURPOSE = "batchnorm.compare's intervals"


@dataclass(frozen=True)
class Interval:
    """A mean over `n` seeds and its confidence interval; `low` and `high` are None for a single value."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def excludes(self, value: float) -> bool:
        """Whether the interval is known and `value` lies outside it."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high

    def clipped(self, low: float, high: float) -> "Interval":
        """The part of the interval between two bounds that the quantity cannot pass.

        Example:
            >>> Interval(0.95, 0.88, 1.02, 3).clipped(0, 1)
            Interval(mean=0.95, low=0.88, high=1, n=3)
        """
        if self.low is None or self.high is None:
            return self
        return Interval(self.mean, min(max(self.low, low), high), max(min(self.high, high), low), self.n)


def check_available() -> None:
    """Raise `MissingDependencyError` now if no interval could be computed later."""
    require("scipy.special", package="scipy", purpose=_PURPOSE)


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Student's interval for the mean: mean ± t(n − 1)·s/√n.

    Args:
        values: one number a seed, at least one.
        confidence: coverage, between 0 and 1.

    Example:
        >>> interval = t_interval([1.0, 2.0, 3.0])
        >>> round(interval.low, 3), interval.mean, round(interval.high, 3)
        (-0.484, 2.0, 4.484)
    """
    data = np.asarray(values, dtype=np.float64)
    n, mean = len(data), float(data.mean())
    if n < 2:
        return Interval(mean, None, None, n)
    special = require("scipy.special", package="scipy", purpose=_PURPOSE)
    half = float(special.stdtrit(n - 1, 0.5 + confidence / 2)) * float(data.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """The geometric mean of paired ratios, with Student's interval of their logarithms.

    Example:
        >>> round(ratio_interval([10, 40], [10, 10]).mean, 9)
        2.0
    """
    logs = [math.log(a / b) for a, b in zip(numerators, denominators, strict=True)]
    of_logs = t_interval(logs)
    low, high = (None if bound is None else math.exp(bound) for bound in (of_logs.low, of_logs.high))
    return Interval(math.exp(of_logs.mean), low, high, of_logs.n)


def first_reach(steps: Sequence[int], score: Sequence[float], target: float) -> int | None:
    """The first recorded step at which the score is at least `target`, or None.

    Example:
        >>> first_reach([0, 10, 20], [0.1, 0.8, 0.9], 0.8)
        10
    """
    return next((step for step, value in zip(steps, score, strict=True) if value >= target), None)


def clear_guess(chance: float, samples: int) -> float:
    """The accuracy that is clearly above `chance`: by two standard errors, 2·√(chance·(1 − chance)/samples).

    Args:
        chance: accuracy of guessing, 0 to 1.
        samples: how many test samples an accuracy rests on.

    Example:
        >>> round(clear_guess(0.1, 100), 3)
        0.16
    """
    return chance + 2 * math.sqrt(chance * (1 - chance) / samples)


def training_bar(chance: float, best: float, clear: float) -> float:
    """The final score from which on a network counts as trained.

    That is halfway from `chance` to `best`, and clearly above `chance`: where nothing ever trained, halfway to the
    best is halfway to the luckiest guess.

    Args:
        chance: the score of guessing, 0 to 1.
        best: the best score seen with either network.
        clear: the score that is clearly above guessing.

    Example:
        >>> training_bar(chance=0.1, best=0.9, clear=0.16)
        0.5
    """
    return max((chance + best) / 2, clear)


def trains(finals: Sequence[float | None], chance: float, best: float, clear: float) -> bool:
    """Whether every seed's final score is above `chance` and reaches `training_bar`.

    Args:
        finals: final score of each seed; None where the training diverged, which is never a success.
        chance: the score of guessing.
        best: the best score seen with either network.
        clear: the score that is clearly above guessing.

    Example:
        >>> trains([0.6, 0.5], chance=0.1, best=0.9, clear=0.16)
        True
        >>> trains([0.9, None], chance=0.1, best=0.9, clear=0.16)
        False
    """
    bar = training_bar(chance, best, clear)
    return all(final is not None and final > chance and final >= bar for final in finals)


@dataclass(frozen=True, eq=False)
class Spread:
    """How batches differ at one layer, (batches, channels) each, in units of the channel's pooled σ.

    `mean` is each batch's mean less the average batch's mean, `spread` each batch's standard deviation less the
    average batch's.
    """

    mean: NDArray[np.float64]
    spread: NDArray[np.float64]


def batch_spread(means: ArrayLike, variances: ArrayLike, counts: ArrayLike) -> Spread:
    """How far each batch's mean and spread lie from the average batch's, in units of σ.

    σ² = Σ_b n_b·(var_b + (mean_b − mean)²) / Σ_b n_b is the variance of all values of a channel together, with
    mean = Σ_b n_b·mean_b / Σ_b n_b. Channels with σ = 0 (dead ones) are left out.

    Args:
        means: (batches, channels).
        variances: (batches, channels), biased.
        counts: (batches,), values a channel in each batch.

    Example:
        >>> result = batch_spread([[1.0], [3.0]], [[0.0], [0.0]], [8, 8])
        >>> result.mean.tolist(), result.spread.tolist()
        ([[-1.0], [1.0]], [[0.0], [0.0]])
    """
    mean, var = np.asarray(means, dtype=np.float64), np.asarray(variances, dtype=np.float64)
    weight = np.asarray(counts, dtype=np.float64)[:, None]
    weight = weight / weight.sum()
    center = (weight * mean).sum(0)
    sigma = np.sqrt((weight * (var + (mean - center) ** 2)).sum(0))
    alive = sigma > 0
    std = np.sqrt(var)
    average_std = (weight * std).sum(0)
    scale = sigma[alive]
    return Spread((mean - center)[:, alive] / scale, (std - average_std)[:, alive] / scale)


def rms(values: ArrayLike) -> float:
    """The root of the mean square.

    Example:
        >>> rms([1.0, 7.0])
        5.0
    """
    return float(np.sqrt(np.mean(np.square(np.asarray(values, dtype=np.float64)))))
