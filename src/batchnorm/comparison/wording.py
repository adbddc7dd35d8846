"""Numbers in words, the same in every sentence and table of a report."""

from collections.abc import Sequence

from batchnorm.comparison.measures import Interval

__all__ = ["NO_DIFFERENCE", "average", "factor", "factors", "joined", "listed", "percent", "points", "span"]

NO_DIFFERENCE = "no difference seen"


def percent(share: float) -> str:
    """0.9356 as "93.6 %"."""
    return f"{100 * share:.1f} %"


def points(difference: float) -> str:
    """0.0213 as "+2.1 points"."""
    return f"{100 * difference:+.1f} points".replace("-", "−")


def span(difference: Interval) -> str:
    """The bounds of a difference, "+1.6 to +6.6"; empty where they are not known."""
    if difference.low is None or difference.high is None:
        return ""
    return f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}".replace("-", "−")


def factor(ratio: Interval) -> str:
    """A ratio of steps as "3.2× fewer steps", or "1.5× more steps" where it is below 1."""
    return f"{ratio.mean:.1f}× fewer steps" if ratio.mean >= 1 else f"{1 / ratio.mean:.1f}× more steps"


def factors(ratio: Interval) -> str:
    """The bounds of `factor`, "2.0× to 5.0×", in its direction; empty where they are not known."""
    if ratio.low is None or ratio.high is None:
        return ""
    low, high = (ratio.low, ratio.high) if ratio.mean >= 1 else (1 / ratio.high, 1 / ratio.low)
    return f"{low:.1f}× to {high:.1f}×"


def joined(parts: Sequence[str]) -> str:
    """Parts as "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def listed(rates: Sequence[float], sweep: Sequence[float]) -> str:
    """Learning rates as "0.1, 0.3 and 3"; three or more neighbours of the sweep as "0.1 to 3"."""
    groups: list[list[float]] = []
    for lr in sorted(rates):
        if groups and sweep.index(lr) == sweep.index(groups[-1][-1]) + 1:
            groups[-1].append(lr)
        else:
            groups.append([lr])
    parts: list[str] = []
    for group in groups:
        parts += [f"{group[0]:g} to {group[-1]:g}"] if len(group) > 2 else [f"{lr:g}" for lr in group]
    return joined(parts)


def average(values: Sequence[float | None]) -> float:
    """The mean of the known values, at least one."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known)
