"""Plain sentences that the numbers support, and no others."""

from collections.abc import Sequence

from batchnorm.comparison.footing import Footing, Side
from batchnorm.comparison.measures import Interval
from batchnorm.comparison.summary import Summary, Target
from batchnorm.report.document import Tone, Verdict

__all__ = ["accuracy", "footing", "headline", "percent", "points", "rates", "span", "speed", "verdicts"]

NO_DIFFERENCE = "no difference seen"


def verdicts(summary: Summary, layer: Footing | None) -> list[Verdict]:
    """The judged sentences, in the order in which they are read."""
    found = [speed(summary), accuracy(summary), rates(summary)]
    return [*found, footing(layer)] if layer is not None else found


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


def speed(summary: Summary) -> Verdict:
    """How many fewer steps batch norm needs to the plain network's best accuracy."""
    label = "How much sooner?"
    target = summary.targets[-1]
    goal = percent(sum(target.accuracy) / len(target.accuracy))
    if not summary.plain.trained_at:
        return Verdict(label, "cannot be said", _never_trained(summary), "neutral")
    if target.ratio is None:
        return _unreached(label, target, goal)
    plain, normalized = _mean(target.plain_steps), _mean(target.normalized_steps)
    facts = (
        f"The best test accuracy of the network without batch norm ({goal}) is reached after {normalized:.0f} steps "
        f"with batch norm and {plain:.0f} without ({_seeds(target.ratio.n)})."
    )
    return _judged_ratio(label, target.ratio, facts, f"{_nearly(summary)}{_time(summary, target.ratio.mean)}")


def accuracy(summary: Summary) -> Verdict:
    """Whether the best test accuracy differs, each network at its own best rate."""
    plain, normalized = _mean(summary.plain.best), _mean(summary.normalized.best)
    text = (
        f"Best test accuracy: {percent(normalized)} with batch norm, {percent(plain)} without. Each at its best "
        f"learning rate ({summary.normalized.best_lr:g} and {summary.plain.best_lr:g}). At the end of training: "
        f"{percent(_mean(summary.normalized.final))} and {percent(_mean(summary.plain.final))}"
        f"{_at_the_end(summary.final_difference)}."
    )
    if summary.plain.edge in ("lowest", "highest"):
        text += (
            f" Without batch norm that is the {summary.plain.edge} rate tried: a better one may lie outside."
        )
    return _judged_difference("How much better?", summary.best_difference, text)


def rates(summary: Summary) -> Verdict:
    """At how many learning rates each still trains."""
    plain, normalized = summary.plain.trained_at, summary.normalized.trained_at
    total = len(summary.plain.rates)
    text = (
        f"With batch norm it trains {_at(normalized)}, without {_at(plain)}. To train means: with every seed the "
        "final accuracy gets at least halfway from guessing to the best seen, and clearly above guessing."
    )
    lower = [
        rate.lr
        for rate, gap in zip(summary.plain.rates, summary.rate_differences, strict=True)
        if gap.mean < 0 and gap.excludes(0)
    ]
    if lower:
        text += f" {_at(lower).capitalize()} the network without batch norm ends higher."
    if plain == normalized:
        return Verdict("At which learning rates?", "the same", text, "neutral")
    tone: Tone = (
        "good" if set(plain) < set(normalized) else "bad" if set(normalized) < set(plain) else "neutral"
    )
    return Verdict("At which learning rates?", f"{len(normalized)} of {total}, not {len(plain)}", text, tone)


def footing(found: Footing) -> Verdict:
    """Whether batches have the same distribution after normalization."""
    text = f"After normalization, batch means lie {found.after.mean:.3f} σ from the average"
    if found.without is not None:
        text += f"; without batch norm, {found.without.mean:.3f} σ"
    text += f". Mean and spread at {found.place}, root mean square over {found.batches} batches: "
    text += f"before normalization {_offsets(found.before)}, after it {_offsets(found.after)}"
    text += "." if found.without is None else f", without batch norm {_offsets(found.without)}."
    if found.sampling is not None:
        text += f" Drawing {found.values} samples at random moves a mean by about {found.sampling:.3f} σ by itself."
    first = max(found.before.mean, found.before.spread)
    left = max(found.after.mean, found.after.spread)
    same = left < 0.01 and left < first / 10
    head = "yes" if same else f"{left:.2f} σ apart"
    return Verdict("The same footing for every batch?", head, text, "good" if same else "neutral")


def headline(summary: Summary, model: str, data: str) -> str:
    """The report's first sentence."""
    if not summary.plain.trained_at and not summary.normalized.trained_at:
        return f"Neither network trained on {data} at any of these learning rates."
    if not summary.plain.trained_at:
        return (
            f"With batch norm, {model} trains on {data}; without, it trains at none of these learning rates."
        )
    ratio, difference = summary.targets[-1].ratio, summary.best_difference
    claims: list[str] = []
    if ratio is not None and ratio.excludes(1):
        factor, kind = (ratio.mean, "fewer") if ratio.mean > 1 else (1 / ratio.mean, "more")
        claims.append(
            f"needs {factor:.1f}× {kind} steps to the accuracy that the plain network reaches at best"
        )
    if difference.excludes(0):
        side = "higher" if difference.mean > 0 else "lower"
        claims.append(f"peaks {abs(100 * difference.mean):.1f} points {side}")
    if summary.plain.trained_at != summary.normalized.trained_at:
        claims.append(
            f"trains at {len(summary.normalized.trained_at)} of {len(summary.plain.rates)} learning rates instead of "
            f"{len(summary.plain.trained_at)}"
        )
    if not claims:
        return f"Between {model} with and without batch norm, no difference was seen on {data}."
    return f"With batch norm, {model} on {data} {_join(claims)}."


def _judged_ratio(label: str, ratio: Interval, facts: str, more: str) -> Verdict:
    better = ratio.mean >= 1
    claim = f"{ratio.mean:.1f}× fewer steps" if better else f"{1 / ratio.mean:.1f}× more steps"
    if ratio.low is None:
        text = f"{facts} One seed: no interval, so chance is not excluded. {more}"
        return Verdict(label, claim, text, "neutral")
    text = f"{facts} Ratio {ratio.mean:.1f}, 95 % interval {ratio.low:.1f} to {ratio.high:.1f}. {more}"
    if not ratio.excludes(1):
        return Verdict(label, NO_DIFFERENCE, text, "neutral")
    return Verdict(label, claim, text, "good" if better else "bad")


def _judged_difference(label: str, difference: Interval, text: str) -> Verdict:
    claim = points(difference.mean)
    if difference.low is None or difference.high is None:
        return Verdict(label, claim, f"{text} One seed: no interval, so chance is not excluded.", "neutral")
    text = f"{text} Paired difference of the best {claim}, 95 % interval {span(difference)}."
    if not difference.excludes(0):
        return Verdict(label, NO_DIFFERENCE, text, "neutral")
    return Verdict(label, claim, text, "good" if difference.mean > 0 else "bad")


def _unreached(label: str, target: Target, goal: str) -> Verdict:
    seeds = len(target.normalized_steps)
    reached = sum(steps is not None for steps in target.normalized_steps)
    text = f"The best test accuracy of the network without batch norm ({goal}) is reached with batch norm in "
    return Verdict(label, "not reached", f"{text}{reached} of {seeds} seeds within the steps given.", "bad")


def _never_trained(summary: Summary) -> str:
    partner = (
        "the one with batch norm does"
        if summary.normalized.trained_at
        else "nor does the one with batch norm"
    )
    return (
        f"Without batch norm the network trains at none of these learning rates; {partner}. Its initialization or the "
        "sweep may be the reason."
    )


def _at_the_end(difference: Interval) -> str:
    if difference.low is None:
        return ""
    seen = "" if difference.excludes(0) else f": {NO_DIFFERENCE}"
    return f" (paired difference {points(difference.mean)}, {span(difference)}{seen})"


def _nearly(summary: Summary) -> str:
    """The ratio to a slightly lower accuracy, which does not hang on the plain network's luckiest evaluation."""
    target = summary.targets[-2]
    if target.ratio is None or target.ratio.low is None:
        return ""
    return (
        f"To {100 * target.share:.0f} % of that accuracy the ratio is {target.ratio.mean:.1f} "
        f"({target.ratio.low:.1f} to {target.ratio.high:.1f}). "
    )


def _time(summary: Summary, ratio: float) -> str:
    plain, normalized = summary.seconds_per_step
    cost = normalized / plain
    gain = ratio / cost
    effect = f"{gain:.1f}× less" if gain >= 1 else f"{1 / gain:.1f}× more"
    return f"A step with batch norm took {cost:.1f}× as long here, which makes {effect} training time."


def _offsets(side: Side) -> str:
    return f"{side.mean:.3f} σ and {side.spread:.3f} σ"


def _at(rates: Sequence[float]) -> str:
    return "at " + _join([f"{rate:g}" for rate in rates]) if rates else "at none of the rates"


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _seeds(n: int) -> str:
    return "one seed" if n == 1 else f"mean of {n} seeds"


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)
