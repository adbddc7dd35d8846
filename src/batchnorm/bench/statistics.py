"""Percentiles and means of times and ratios: pure functions of numbers."""

import math
from collections.abc import Iterable, Sequence

__all__ = ["geometric_mean", "median", "percentile"]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the others lie, interpolated between neighbours.

    Example:
        >>> percentile([4.0, 1.0, 3.0, 2.0], 0.5), percentile([1.0, 2.0], 0.2)
        (2.5, 1.2)
    """
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle."""
    return percentile(values, 0.5)


def geometric_mean(weighted: Iterable[tuple[float, float]]) -> float:
    """exp(Σ w·ln v / Σ w) over pairs (v, w): the mean of ratios, by which 2 and 1/2 cancel.

    Example:
        >>> geometric_mean([(4.0, 1), (0.5, 2)])
        1.0
    """
    pairs = list(weighted)
    total = sum(weight for _, weight in pairs)
    return math.exp(sum(weight * math.log(value) for value, weight in pairs) / total)
