"""Numbers in words, the same in every sentence and table of a report."""

from collections.abc import Sequence
from dataclasses import dataclass

from batchnorm.comparison.measures import Interval

__all__ = ["NO_DIFFERENCE", "Words", "average", "factor", "factors", "joined", "listed", "words"]

NO_DIFFERENCE = "no difference seen"


@dataclass(frozen=True)
class Words:
    """How a score is spoken of: accuracy in percent, or R² as a number.

    Args:
        metric: what the score is called.
        metrics: the same, of several.
        loss: the training loss with its unit.
        guessing: what the score of guessing is the score of.
        axis: the format of an axis of scores.
    """

    metric: str
    metrics: str
    loss: str
    guessing: str
    axis: str

    @property
    def _percent(self) -> bool:
        return self.axis.endswith("%")

    @property
    def unit(self) -> str:
        """The unit of a difference."""
        return " points" if self._percent else ""

    def score(self, value: float) -> str:
        """0.9356 as "93.6 %", or as "0.936"."""
        return f"{100 * value:.1f} %" if self._percent else f"{value:.3f}"

    def difference(self, value: float) -> str:
        """0.0213 as "+2.1 points", or as "+0.021"."""
        text = f"{100 * value:+.1f} points" if self._percent else f"{value:+.3f}"
        return text.replace("-", "−")

    def size(self, value: float) -> str:
        """The size of a difference: 0.0213 as "2.1 points", or as "0.021"."""
        return self.difference(abs(value)).removeprefix("+")

    def span(self, difference: Interval) -> str:
        """The bounds of a difference, "+1.6 to +6.6"; empty where they are not known."""
        if difference.low is None or difference.high is None:
            return ""
        low, high = (
            self.difference(bound).removesuffix(" points") for bound in (difference.low, difference.high)
        )
        return f"{low} to {high}"

    def interval(self, value: Interval) -> str:
        """A mean score and its interval; one may reach beyond 0 or 1, which no score does."""
        if value.low is None or value.high is None:
            return self.score(value.mean)
        low, high = (
            self.score(bound).removesuffix(" %") for bound in (max(value.low, 0), min(value.high, 1))
        )
        return f"{self.score(value.mean)} ({low} to {high})"


_WORDS = {
    "classification": Words("accuracy", "accuracies", "in nats", "guessing", ".0%"),
    "regression": Words(
        "R²",
        "values of R²",
        "in units of the targets' variance",
        "predicting the mean of the targets",
        ".2f",
    ),
}


def words(task: str) -> Words:
    """How the scores of a task are spoken of.

    Example:
        >>> words("classification").score(0.9356), words("regression").score(0.9356)
        ('93.6 %', '0.936')
    """
    return _WORDS[task]


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
