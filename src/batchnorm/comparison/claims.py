"""What a comparison may claim: differences whose interval excludes chance, gains and losses alike."""

from collections.abc import Sequence

from batchnorm.comparison.measures import Interval
from batchnorm.comparison.summary import JUDGED, Arm, Summary
from batchnorm.comparison.tasks import task_named
from batchnorm.comparison.wording import (
    NO_DIFFERENCE,
    average,
    factor,
    factors,
    joined,
    listed,
)

__all__ = [
    "TOO_FEW",
    "all_diverged",
    "ends_lower",
    "headline",
    "neither_trained",
    "rates_gained",
    "rates_lost",
    "too_few",
    "too_wide",
    "untrained",
]

TOO_FEW = "too few seeds to tell"
# From these sizes on, an observed difference that may be chance is called undecided, not absent.
LARGE_DIFFERENCE, LARGE_RATIO = 0.02, 1.5


def rates_gained(summary: Summary) -> list[float]:
    """The learning rates at which only batch norm trains and ends higher by more than chance."""
    return _changed(summary, gained=True)


def rates_lost(summary: Summary) -> list[float]:
    """The learning rates at which only the plain network trains and ends higher by more than chance."""
    return _changed(summary, gained=False)


def ends_lower(summary: Summary) -> list[float]:
    """The learning rates at which the network with batch norm ends lower by more than chance."""
    pairs = zip(summary.plain.rates, summary.rate_differences, strict=True)
    return [rate.lr for rate, gap in pairs if gap.mean < 0 and gap.excludes(0)]


def too_few(value: Interval, *, ratio: bool = False) -> bool:
    """Whether a large difference was observed and its interval still holds "none": undecided rather than equal."""
    if value.low is None or value.excludes(1 if ratio else 0):
        return False
    if ratio:
        return not 1 / LARGE_RATIO < value.mean < LARGE_RATIO
    return abs(value.mean) >= LARGE_DIFFERENCE


def too_wide(summary: Summary, difference: Interval) -> str:
    """Why an observed difference of scores is no finding."""
    return f"{NO_DIFFERENCE}: the interval {summary.words.span(difference)} is too wide"


def all_diverged(summary: Summary, *arms: Arm) -> bool:
    """Whether these networks diverged at every rate with every seed."""
    return all(rate.diverged == len(summary.seeds) for arm in arms for rate in arm.rates)


def untrained(summary: Summary, *arms: Arm) -> str:
    """Possible reasons why these networks count as trained at no rate, in one sentence."""
    if all_diverged(summary, *arms):
        sides = {id(summary.plain): " without batch norm", id(summary.normalized): " with batch norm"}
        whose = sides[id(arms[0])] if len(arms) == 1 else ""
        return f"Every training{whose} diverged: lower learning rates may help."
    w = summary.words
    reasons: list[str] = []
    if any(arm.improving for arm in arms):
        reasons.append("too few steps, as the training loss was still falling in the last tenth of them")
    if _guesses(summary):
        reasons.append(
            f"the test set, as on {summary.samples:,} samples less than {w.score(summary.bar)} is not clearly above "
            f"{w.guessing} ({w.score(summary.chance)})"
        )
    reasons += ["the initialization", "the learning rates tried"]
    # A network may rest on a plateau before it learns, so steps may be lacking even where the loss stands still.
    reasons += [] if any(arm.improving for arm in arms) else ["too few steps"]
    return f"Possible reasons: {'; '.join(reasons)}."


def neither_trained(summary: Summary) -> str:
    """That neither network counts as trained, by the score that was not reached."""
    w = summary.words
    bar = (
        f"clearly above {w.guessing}" if _guesses(summary) else f"halfway from {w.guessing} to the best seen"
    )
    return (
        f"neither network ended {bar} ({w.score(summary.bar)}) with every seed at any of these learning rates; "
        f"{w.guessing} gives {w.score(summary.chance)}"
    )


def _guesses(summary: Summary) -> bool:
    """Whether the test set cannot tell what was reached from guessing."""
    return summary.bar <= task_named(summary.task).clear(summary.chance, summary.samples)


def headline(summary: Summary, model: str, data: str) -> str:
    """The report's first sentence: every difference that is more than chance, whichever side it favours."""
    name = f"{model} on {data}"
    w = summary.words
    plain, normalized = w.score(average(summary.plain.best)), w.score(average(summary.normalized.best))
    if not summary.plain.trained_at and not summary.normalized.trained_at:
        return f"{name}: {neither_trained(summary)}. {untrained(summary, summary.plain, summary.normalized)}"
    if summary.one_seed:
        return (
            f"One seed cannot tell a difference from chance; in it {name} reaches a test {w.metric} of "
            f"{normalized} with batch norm, {plain} without."
        )
    gains, losses = _gains(summary), _losses(summary)
    if gains:
        but = f" But it {joined(losses)}." if losses else ""
        return f"With batch norm, {name} {joined(gains)}.{but}"
    if losses:
        return f"With batch norm, {name} {joined(losses)}."
    if too_few(summary.best_difference):
        return (
            f"{name}: {TOO_FEW}. The best test {w.metric} is {normalized} with batch norm and {plain} without, but "
            f"{too_wide(summary, summary.best_difference)}."
        )
    ratio = _ratio(summary)
    if ratio is not None and too_few(ratio, ratio=True):
        return (
            f"{name}: {TOO_FEW}. With batch norm it needs {factor(ratio)} to {_goal(summary)}, but the interval "
            f"{ratio.low:.1f} to {ratio.high:.1f} is too wide: {NO_DIFFERENCE}."
        )
    return f"Between {model} with and without batch norm, no difference was seen on {data}."


def _gains(summary: Summary) -> list[str]:
    w = summary.words
    found: list[str] = []
    ratio, best, final = _ratio(summary), summary.best_difference, summary.final_difference
    if ratio is not None and ratio.excludes(1) and ratio.mean > 1:
        found.append(f"needs {factor(ratio)} ({factors(ratio)}) to {_goal(summary)}")
    if best.excludes(0) and best.mean > 0:
        found.append(f"peaks {w.size(best.mean)} higher ({w.span(best)})")
    elif final.excludes(0) and final.mean > 0:
        found.append(f"ends {w.size(final.mean)} higher ({w.span(final)})")
    if gained := rates_gained(summary):
        sets = set(summary.plain.trained_at), set(summary.normalized.trained_at)
        total = len(summary.plain.rates)
        if sets[1] - sets[0] == set(gained) and sets[0] < sets[1]:
            before = f"{len(sets[0])}" if sets[0] else "none"
            found.append(f"trains at {len(sets[1])} of {total} learning rates instead of {before}")
        else:
            found.append(f"trains at {len(gained)} more of {total} learning rates")
    return found


def _losses(summary: Summary) -> list[str]:
    w = summary.words
    found: list[str] = []
    ratio, best, final = _ratio(summary), summary.best_difference, summary.final_difference
    sweep = [rate.lr for rate in summary.plain.rates]
    if ratio is not None and ratio.excludes(1) and ratio.mean < 1:
        found.append(f"needs {factor(ratio)} ({factors(ratio)}) to {_goal(summary)}")
    if best.excludes(0) and best.mean < 0:
        missed = summary.plain.trained_at and None in summary.judged.normalized_steps
        found += [f"does not reach {_goal(summary)} with every seed"] if missed else []
        found.append(f"peaks {w.size(best.mean)} lower ({w.span(best)})")
    if final.excludes(0) and final.mean < 0:
        found.append(f"ends {w.size(final.mean)} lower ({w.span(final)})")
    lost = rates_lost(summary)
    if lost:
        found.append(f"does not train at {_rates(lost, sweep)} unlike the plain network")
    # Where neither trains, which of two guesses is higher is no loss.
    lower = [lr for lr in ends_lower(summary) if lr not in lost and lr in summary.plain.trained_at]
    if lower and sweep != lower:
        gap = summary.rate_differences[sweep.index(lower[0])]
        by = f" ({w.span(gap)}{w.unit})" if len(lower) == 1 else ""
        found.append(f"ends lower than the plain network at {_rates(lower, sweep)}{by}")
    return found


def _ratio(summary: Summary) -> Interval | None:
    """The judged ratio of steps; none where the plain network learned nothing that could be reached sooner."""
    return summary.judged.ratio if summary.plain.trained_at else None


def _changed(summary: Summary, *, gained: bool) -> list[float]:
    sides = zip(summary.plain.rates, summary.normalized.rates, summary.rate_differences, strict=True)
    return [
        plain.lr
        for plain, normalized, gap in sides
        if normalized.trains == gained
        and plain.trains != gained
        and gap.excludes(0)
        and (gap.mean > 0) == gained
    ]


def _rates(lrs: Sequence[float], sweep: Sequence[float]) -> str:
    return f"the learning rate{'s' if len(lrs) > 1 else ''} {listed(lrs, sweep)}"


def _goal(summary: Summary) -> str:
    return f"{100 * JUDGED:.0f} % of the plain network's best test {summary.words.metric}"
