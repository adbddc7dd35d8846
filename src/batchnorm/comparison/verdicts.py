"""The cards of a report: plain sentences that the numbers support, and no others."""

from batchnorm.comparison.claims import (
    TOO_FEW,
    ends_lower,
    headline,
    neither_trained,
    rates_gained,
    rates_lost,
    too_few,
    too_wide,
    untrained,
)
from batchnorm.comparison.footing import Footing, Side
from batchnorm.comparison.measures import Interval
from batchnorm.comparison.summary import Summary, Target
from batchnorm.comparison.wording import (
    NO_DIFFERENCE,
    average,
    factor,
    factors,
    joined,
    listed,
)
from batchnorm.report.document import Tone, Verdict

__all__ = ["footing", "headline", "quality", "rates", "speed", "verdicts"]

SOONER, BETTER = "How much sooner?", "How much better?"
RATES, FOOTING = "At which learning rates?", "The same footing for every batch?"
ONE_SEED = "One seed: no interval, so chance is not excluded."


def verdicts(summary: Summary, layer: Footing | None) -> list[Verdict]:
    """The judged sentences, in the order in which they are read."""
    found = [speed(summary), quality(summary), rates(summary)]
    if layer is None:
        return found
    return [*found, footing(layer)]


def speed(summary: Summary) -> Verdict:
    """How many fewer steps batch norm needs to 99 % of the plain network's best score."""
    target = summary.judged
    if not summary.plain.trained_at:
        return Verdict(SOONER, "cannot be said", _no_goal(summary), "neutral")
    if target.ratio is None:
        return _unreached(summary, target)
    ratio = target.ratio
    with_, without = average(target.normalized_steps), average(target.plain_steps)
    facts = f"{with_:.0f} steps instead of {without:.0f} to {_goal(summary, target)}"
    more = f"{_whole(summary)} {_time(summary, ratio)}"
    if ratio.low is None:
        return Verdict(SOONER, f"one seed: {factor(ratio)}", f"{facts}. {ONE_SEED} {more}", "neutral")
    if not ratio.excludes(1):
        wide = too_few(ratio, ratio=True)
        text = f"{facts}; ratio {ratio.mean:.1f}, 95 % interval {ratio.low:.1f} to {ratio.high:.1f}."
        why = " No difference seen: the interval " + ("is too wide." if wide else "holds 1.")
        return Verdict(SOONER, TOO_FEW if wide else NO_DIFFERENCE, f"{text}{why} {more}", "neutral")
    text = f"{facts}; 95 % interval {factors(ratio)}. Steps are means of {ratio.n} seeds. {more}"
    return Verdict(SOONER, factor(ratio), text, "good" if ratio.mean > 1 else "bad")


def quality(summary: Summary) -> Verdict:
    """Whether the best test score differs, each network at its own best rate."""
    w = summary.words
    plain, normalized = summary.plain, summary.normalized
    best = summary.best_difference
    text = (
        f"Best test {w.metric} {w.score(average(normalized.best))}, without {w.score(average(plain.best))}"
        f"{_bounds(summary, best)}; at the end of training {w.score(average(normalized.final))} and "
        f"{w.score(average(plain.final))}{_at_the_end(summary)}. Each network at its best learning "
        f"rate ({normalized.best_lr:g} with batch norm, {plain.best_lr:g} without). {_losses(summary)}"
    )
    if plain.edge in ("lowest", "highest"):
        text += f" Without batch norm that rate is the {plain.edge} rate tried: a better one may lie outside."
    claim = w.difference(best.mean)
    if not plain.trained_at and not normalized.trained_at:
        return Verdict(BETTER, "cannot be said", f"{text} {_no_goal(summary)}", "neutral")
    if best.low is None:
        return Verdict(BETTER, f"one seed: {claim}", f"{text} {ONE_SEED}", "neutral")
    text += f" The best {w.metrics} differ by {claim}, paired by seed."
    if too_few(best):
        return Verdict(
            BETTER, TOO_FEW, f"{text} Of the best {w.metrics}, {too_wide(summary, best)}.", "neutral"
        )
    if not best.excludes(0):
        return Verdict(BETTER, NO_DIFFERENCE, f"{text} The interval holds 0: no difference seen.", "neutral")
    return Verdict(BETTER, claim, text, "good" if best.mean > 0 else "bad")


def rates(summary: Summary) -> Verdict:
    """At how many learning rates each still trains; only rates whose final scores differ by more than chance."""
    w = summary.words
    plain, normalized = summary.plain.trained_at, summary.normalized.trained_at
    sweep = [rate.lr for rate in summary.plain.rates]
    gained, lost, lower = rates_gained(summary), rates_lost(summary), ends_lower(summary)
    clear = sorted([*gained, *lost])
    text = f"Trains {_at(normalized, sweep)} with batch norm, {_at(plain, sweep)} without"
    text += f"; the difference is more than chance (95 %) {_at(clear, sweep)}." if clear else "."
    text += (
        f" To train means that every seed ends at {w.score(summary.bar)} or more, which is at least halfway from "
        f"{w.guessing} ({w.score(summary.chance)}) to the best seen and clearly above it."
    )
    if not plain or not normalized:
        arm, side = (summary.normalized, "With") if not normalized else (summary.plain, "Without")
        text += f" {side} batch norm that happens at no rate. {untrained(summary, arm)}"
    if lower:
        text += f" {_at(lower, sweep).capitalize()} the network without batch norm ends higher."
    if plain == normalized:
        return Verdict(RATES, "the same", text, "neutral")
    counts = f"{len(normalized)} of {len(sweep)}, not {len(plain)}"
    if summary.one_seed:
        return Verdict(RATES, f"one seed: {counts}", f"{text} {ONE_SEED}", "neutral")
    if not clear:
        more = "Where only one trains, the interval of the difference holds 0: no difference seen."
        return Verdict(RATES, NO_DIFFERENCE, f"{text} {more}", "neutral")
    changes = [f"{len(gained)} more"] if gained else []
    changes += [f"{len(lost)} fewer"] if lost else []
    whole = len(changes) == 1 and set(clear) == set(plain) ^ set(normalized)
    head = counts if whole else f"{joined(changes)} of {len(sweep)}"
    tone: Tone = "neutral" if gained and lost else "good" if gained else "bad"
    return Verdict(RATES, head, text, tone)


def footing(found: Footing) -> Verdict:
    """How far batches lie apart at a hidden layer, without batch norm and after it."""
    raw, side = (
        (found.before, "before it") if found.without is None else (found.without, "without batch norm")
    )
    head = f"{raw.mean:.3f} → {found.after.mean:.3f} σ"
    text = f"Batch means lie {raw.mean:.3f} σ from the average {side}"
    if found.sampling is not None:
        text += f" (drawing {found.values} samples at random: {found.sampling:.3f} σ)"
    same = max(found.after.mean, found.after.spread) < 0.01
    text += f"; after it {found.after.mean:.3f} σ{', by construction' if same else ''}."
    text += f" {_places(found)}"
    if found.sampling is not None and found.before.mean < found.sampling / 2:
        text += (
            " Less than random drawing gives before normalization: the batch norms below have already evened out "
            "this layer's input."
        )
    if not same:
        text += f" {_not_same(found)}"
    # What holds by construction is no merit.
    return Verdict(FOOTING, head, text, "neutral")


def _no_goal(summary: Summary) -> str:
    if not summary.normalized.trained_at:
        text = f"{neither_trained(summary)}. {untrained(summary, summary.plain, summary.normalized)}"
        return text[0].upper() + text[1:]
    return (
        "Without batch norm the network trains at none of these learning rates, so there is no goal to reach; with "
        f"batch norm it does. {untrained(summary, summary.plain)}"
    )


def _unreached(summary: Summary, target: Target) -> Verdict:
    w = summary.words
    steps = target.normalized_steps
    reached = sum(value is not None for value in steps)
    if reached == len(steps):
        text = f"A network reaches {_goal(summary, target)}, before its first step."
        return Verdict(SOONER, "cannot be said", text, "neutral")
    best = summary.best_difference
    below = best.excludes(0) and best.mean < 0
    text = (
        f"{_goal(summary, target)}, is reached with batch norm in {reached} of {len(steps)} seeds within the steps "
        "given."
    )
    if best.low is None:
        text += f" {ONE_SEED}"
    elif not below:
        text += (
            f" The best {w.metrics} differ by {w.difference(best.mean)} ({w.span(best)}): {NO_DIFFERENCE}."
        )
    else:
        text += f" Its best {w.metric} lies {w.difference(best.mean)} away ({w.span(best)})."
    head = "not reached by every seed" if reached else "not reached"
    return Verdict(SOONER, head, text, "bad" if below else "neutral")


def _goal(summary: Summary, target: Target) -> str:
    return f"{summary.words.score(average(target.score))}, {100 * target.share:.0f} % of the plain network's best"


def _whole(summary: Summary) -> str:
    """The steps to all of the plain network's best score, which is not judged."""
    target = summary.targets[-1]
    goal = f"The whole of that best, {summary.words.score(average(target.score))}, is the luckiest evaluation of many"
    if target.ratio is None:
        steps = target.normalized_steps
        count = sum(value is not None for value in steps)
        return f"{goal}; with batch norm {count} of {len(steps)} seeds reach it."
    ratio = target.ratio
    bounds = "" if ratio.low is None else f" ({ratio.low:.1f} to {ratio.high:.1f})"
    return (
        f"{goal}; it takes {average(target.normalized_steps):.0f} steps instead of "
        f"{average(target.plain_steps):.0f}, a ratio of {ratio.mean:.1f}{bounds}."
    )


def _time(summary: Summary, ratio: Interval) -> str:
    plain, normalized = summary.seconds_per_step
    cost = normalized / plain
    text = f"A step with batch norm took {cost:.1f}× as long here"
    if not ratio.excludes(1):
        return f"{text}."
    gain = ratio.mean / cost
    effect = f"{gain:.1f}× less" if gain >= 1 else f"{1 / gain:.1f}× more"
    return f"{text}, which makes {effect} training time."


def _bounds(summary: Summary, difference: Interval) -> str:
    return "" if difference.low is None else f" ({summary.words.span(difference)})"


def _at_the_end(summary: Summary) -> str:
    difference = summary.final_difference
    if difference.low is None:
        return ""
    return f" ({summary.words.span(difference)})" if difference.excludes(0) else f": {NO_DIFFERENCE}"


def _losses(summary: Summary) -> str:
    """The training losses at the end: a network may fit its training data far better and not know more."""
    sides = [_loss(arm.final_loss) for arm in (summary.normalized, summary.plain)]
    return f"Training loss at the end: {sides[0]} with batch norm, {sides[1]} without."


def _loss(values: tuple[float | None, ...]) -> str:
    return "diverged" if all(value is None for value in values) else f"{average(values):.2g}"


def _places(found: Footing) -> str:
    text = f"Mean and spread at {found.place}, root mean square over {found.batches} batches: before normalization "
    text += f"{_offsets(found.before)}, after it {_offsets(found.after)}"
    return f"{text}." if found.without is None else f"{text}, without batch norm {_offsets(found.without)}."


def _not_same(found: Footing) -> str:
    if found.tiny:
        many = f"{found.tiny} of {found.channels} channels have"
        return f"After it batches still differ: {many} a variance below 10·eps, too small to be scaled to 1."
    return (
        "After it batches still differ: the layer does not use each batch's own statistics, or some channels vary too "
        "little beside eps."
    )


def _offsets(side: Side) -> str:
    return f"{side.mean:.3f} σ and {side.spread:.3f} σ"


def _at(lrs: list[float] | tuple[float, ...], sweep: list[float]) -> str:
    return f"at {listed(lrs, sweep)}" if lrs else "at none of the rates"
