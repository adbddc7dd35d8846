"""The sentences that depend on the settings, each with the numbers for which it is true.

A text is a row of sentences. A sentence has several wordings; the first whose conditions hold is said, and one
without conditions stands last. `{name:2}` is a number of `words.numbers` with two decimals, `{name}` with those it has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from batchnorm.explain.runners import BASE, COOL, DAYS, RUNNERS

__all__ = ["DAY", "TEXTS", "Said"]

# The day whose times are put into the formulas, a hot one, counted from 1.
DAY = 3
_ANY = (-1e9, 1e9)
_ZERO = (0.0, 0.0)
_ALL = (RUNNERS, RUNNERS)
# The spread of x̂ is 1 where ε is small beside the variance; from here on it is written as 1. With few runners the
# times of a day may nearly agree, and even the usual ε counts: `spread` is a typical day's, `spread_low` the least.
_ONE = (0.975, 1.0)
# What heat takes from the correlation of raw times, `hidden`, and what is left of it, so that it hides who improves.
_HIDES = {"difference": (1.0, 99.0), "hidden": (0.3, 2.0), "before": (-1.0, 0.4)}


@dataclass(frozen=True)
class Said:
    """One wording, and when it is true: a number's name to its lowest and highest value."""

    text: str
    when: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def _always(text: str) -> Sequence[Said]:
    return (Said(text),)


TEXTS: Mapping[str, Sequence[Sequence[Said]]] = {
    "lead": (
        _always(f"A coach times {RUNNERS} runners over {DAYS} days."),
        (
            Said("No day is hotter than another now.", {"difference": _ZERO}),
            Said(
                f"On hot days ({{hot:0}}\u00a0°C) all are slower than on cool ones ({COOL:.0f}\u00a0°C), and that "
                "hides who is improving.",
                _HIDES,
            ),
            Said(
                f"On hot days ({{hot:0}}\u00a0°C) all are slower than on cool ones ({COOL:.0f}\u00a0°C), and that "
                "makes it harder to see who is improving.",
                {"difference": (1, 99), "hidden": (0.1, 2)},
            ),
            Said(
                f"On hot days ({{hot:0}}\u00a0°C) all are slower than they would be on a cool one "
                f"({COOL:.0f}\u00a0°C)."
            ),
        ),
        (
            Said("Nobody's form changes now, so there is nothing to find out.", {"trend": _ZERO}),
            Said("Batch norm takes all of it away now, because γ is 0.", {"gamma": _ZERO}),
            Said(
                "Batch norm takes each day's mean and spread away, and it shows.",
                {"spread": _ONE, "gain": (0.3, 2)},
            ),
            Said(
                "Batch norm takes each day's mean and spread away, which helps here.",
                {"spread": _ONE, "gain": (0.1, 2)},
            ),
            Said(
                "Batch norm takes each day's mean and spread away, which helps a little here.",
                {"spread": _ONE, "gain": (0.02, 2)},
            ),
            Said(
                "Batch norm takes each day's mean and spread away, which changes little here.",
                {"spread": _ONE, "gain": (-0.02, 2)},
            ),
            Said(
                "Batch norm takes each day's mean and spread away, and with so few runners part of their form with "
                "them: the correlation falls from {before:2} to {after:2}.",
                {"spread": _ONE, "runners": (2, 4)},
            ),
            Said(
                "Batch norm takes each day's mean and spread away, and part of the runners' form with them: the "
                "correlation falls from {before:2} to {after:2}.",
                {"spread": _ONE},
            ),
            Said(
                "Batch norm takes each day's mean away; ε is so large now that the spread stays, at least in part."
            ),
        ),
        _always("The runners are made up, so that the truth is known; this library computes every number."),
    ),
    "raw-card": (
        (
            Said("1 would be everything, 0 nothing.", {"before": _ANY}),
            Said("Nobody's form changes (the fitness trend is 0), so there is nothing to correlate with."),
        ),
    ),
    "after-card": (
        (
            Said("The same runs, the same truth.", {"after": _ANY}),
            Said(
                "Nobody's form changes (the fitness trend is 0), so there is nothing to correlate with.",
                {"trend": _ZERO},
            ),
            Said("With γ = 0 every output is the same β, and what never varies correlates with nothing."),
        ),
    ),
    "missing": (
        (
            Said("Move the fitness trend above 0 to see one.", {"trend": _ZERO}),
            Said("Move γ above 0 to see one.", {"gamma": _ZERO}),
            Said("What is missing to 1: a runner's good and bad days;", {"runners": _ALL}),
            Said("What is missing to 1: a runner's good and bad days; the chance of who came that day;"),
        ),
        (
            Said("", {"trend": _ZERO}),
            Said("", {"gamma": _ZERO}),
            Said("and a σ that so few runners leave to chance.", {"spread": _ONE, "runners": (2, 4)}),
            Said(
                "and the spread of the true form, which is smaller in the middle of the season and is divided away "
                "together with the heat's.",
                {"spread": _ONE, "difference": (1, 99), "trend": (0.1, 1)},
            ),
            Said(
                "and the spread of the true form, which is smaller in the middle of the season and is divided away.",
                {"spread": _ONE, "trend": (0.1, 1)},
            ),
            Said("and the spread of the true form, which is divided away.", {"spread": _ONE}),
            Said(
                "and that the field is wider on hot days, which so large an ε leaves in, wholly or in part.",
                {"difference": (1, 99)},
            ),
            Said("and what division by σ still takes of the true form's own spread."),
        ),
    ),
    "season": (
        _always(
            f"Time = {BASE:.0f} s + heat + (1 + 0.03·heat)·(form + noise), heat being 1 s for each degree above "
            f"{COOL:.0f} °C."
        ),
        (
            Said("The fitness trend is 0: every runner's form stays what it was.", {"trend": _ZERO}),
            Said(
                "Half of the runners get faster at their own pace, half slower, by up to {trend:2} s a day; that is "
                "the true form."
            ),
        ),
        (
            Said(f"Each day all {RUNNERS} come.", {"runners": _ALL}),
            Said(f"Each day {{runners}} of the {RUNNERS} come."),
        ),
    ),
    "raw-caption": (
        _always("One dot a run."),
        (
            Said("The line is one runner's, whose form does not change.", {"trend": _ZERO}),
            Said(
                "The line is the runner whose form in truth improves most, of those who came three times or more: "
                "{faster_runs} runs."
            ),
        ),
    ),
    "raw-alt": (
        (
            Said("Times by day. Those called hot are as cool as the others now.", {"difference": _ZERO}),
            Said(
                "Times by day, on average {cool_mean:1} s on cool ones and {hot_mean:1} s on hot ones. The line of one "
                "runner jumps up and down with the weather.",
                {"difference": (5, 99)},
            ),
            Said("Times by day, on average {cool_mean:1} s on cool ones and {hot_mean:1} s on hot ones."),
        ),
    ),
    "mean": (
        _always("A batch is one day. Add up its times and divide by the number of runners."),
        (
            Said(
                "Without heat, hot days are days like any other: {hot_mean:1} s on average, and {cool_mean:1} s on "
                "cool ones.",
                {"difference": _ZERO},
            ),
            Said(
                "On a hot day the mean is high because heat slows everyone: {hot_mean:1} s on average, and "
                "{cool_mean:1} s on a cool one.",
                {"difference": (3, 99)},
            ),
            Said("On average that gives {hot_mean:1} s on hot days and {cool_mean:1} s on cool ones."),
        ),
        (
            Said("", {"difference": _ZERO}),
            Said(f"Day {DAY}, which the formulas show, is a hot one."),
        ),
    ),
    "mean-caption": (
        (
            Said(
                "What all runners of a day have in common is in this line. Without heat that is little but chance.",
                {"difference": _ZERO},
            ),
            Said(
                "What all runners of a day have in common, the weather above all, is in this line.",
                {"difference": (3, 99)},
            ),
            Said("What all runners of a day have in common is in this line: a little weather, and chance."),
        ),
    ),
    "mean-alt": (
        (
            Said(
                "The line of daily means jumps between a low level on cool days and a high level on hot ones.",
                {"difference": (3, 99)},
            ),
            Said("The line of daily means, which is nearly level."),
        ),
    ),
    "variance-caption": (
        (
            Said(
                "Heat does not only slow everyone, it drives the field apart: σ is {hot_spread:2} s on an average hot "
                "day, {cool_spread:2} s on a cool one.",
                {"difference": (1, 99), "widening": (0.05, 99)},
            ),
            Said("σ is {hot_spread:2} s on an average hot day, {cool_spread:2} s on a cool one."),
        ),
        (
            Said(
                "It is smallest in the middle of the season, where those who get faster pass those who get slower.",
                {"trend": (0.1, 1), "runners": (8, RUNNERS)},
            ),
            Said(""),
        ),
    ),
    "variance-alt": (
        (
            Said(
                "The level is gone. What is left is wider on hot days: there σ is larger.",
                {"difference": (1, 99), "widening": (0.05, 99)},
            ),
            Said("The distances from each day's mean, and σ on either side."),
        ),
    ),
    "normalize": (
        _always("Take the day's mean off, divide by the day's spread."),
        (
            Said(
                "Now every day has mean 0 and spread 1, hot or cool. With two runners that is −1 and +1, whatever "
                "they ran.",
                {"spread_low": _ONE, "runners": (2, 2)},
            ),
            Said(
                "Now every day has mean 0 and spread 1, hot or cool, and a runner's number says how they did against "
                "the others that day.",
                {"spread_low": _ONE},
            ),
            Said(
                "Now every day has mean 0, and most days spread 1, hot or cool. With two runners that is −1 and +1, "
                "whatever they ran; where their times nearly agree, ε = {eps} counts beside the variance, and the "
                "spread is as low as {spread_low:2}.",
                {"spread": _ONE, "runners": (2, 2)},
            ),
            Said(
                "Now every day has mean 0, and most days spread 1, hot or cool. Where the times of a day lie close "
                "together, ε = {eps} counts beside the variance, and the spread is as low as {spread_low:2}.",
                {"spread": _ONE},
            ),
            Said(
                "Now every day has mean 0. But ε = {eps} is no longer small beside the variance: the spread is not 1 "
                "but {spread_low:2} to {spread_high:2}, depending on the day."
            ),
        ),
        _always("ε keeps the division safe where all times are equal."),
    ),
    "normalize-alt": (
        (
            Said("All dots lie at −1 and +1.", {"spread_low": _ONE, "runners": (2, 2)}),
            Said("Most dots lie at −1 and +1.", {"spread": _ONE, "runners": (2, 2)}),
            Said(
                "Hot and cool days lie on top of each other, and the line of the improving runner now falls.",
                {"spread": _ONE, "trend": (0.1, 1), "runners": (12, RUNNERS)},
            ),
            Said("Hot and cool days lie on top of each other.", {"spread": _ONE}),
            Said("The dots lie about 0, and closer to it than without so large an ε."),
        ),
    ),
    "scale": (
        _always(
            "A scale with mean 0 may not be what is wanted next, so two more numbers stretch and move it."
        ),
        (
            Said(
                "Here γ = 0: every output is β = {beta}, and nothing is left of the runners.",
                {"gamma": _ZERO},
            ),
            Said(
                "Here the coach chose γ = {gamma} and β = {beta}, which looks like seconds again.",
                {"gamma": (3, 3), "beta": (90, 90), "spread": _ONE},
            ),
            Said("Here γ = {gamma} and β = {beta}."),
        ),
        _always("A network learns both."),
    ),
    "scale-caption": (
        (
            Said("With γ = 0 all that is left is a line at β.", {"gamma": _ZERO}),
            Said("β moves the whole picture, γ stretches it. Neither changes who stands where."),
        ),
    ),
    "scale-alt": (
        (
            Said("All dots lie at {beta}.", {"gamma": _ZERO}),
            Said("The picture before, stretched {gamma} times and moved to {beta}."),
        ),
    ),
    "trend": (
        _always("The question was who is improving."),
        (
            Said(
                "Now nobody is: the fitness trend is 0. So there is nothing that times could correlate with.",
                {"trend": _ZERO},
            ),
            Said(
                "Correlation with the true form: raw times {before:2}. After batch norm there is none, because with "
                "γ = 0 all outputs are the same β.",
                {"gamma": _ZERO},
            ),
            Said("Correlation with the true form: raw times {before:2}, after batch norm {after:2}."),
        ),
    ),
    "trend-caption": (
        (
            Said("Lower is faster. Two runners, whose form does not change.", {"trend": _ZERO}),
            Said(
                "Lower is faster. Of those who came three times or more, solid: the runner who improves most "
                "({faster_runs} runs); dashed: the one who declines most ({slower_runs} runs)."
            ),
        ),
    ),
    "trend-averages": (
        (
            Said("Without a trend there is nothing to compare.", {"trend": _ZERO}),
            Said(
                "On average from the first third of the season to the last: the one who gets faster raw "
                "{faster_early_raw:1} → {faster_late_raw:1} s, after batch norm {faster_early_after:1} → "
                "{faster_late_after:1}, in truth {faster_early_true:1} → {faster_late_true:1} s; the one who gets "
                "slower raw {slower_early_raw:1} → {slower_late_raw:1} s, after batch norm {slower_early_after:1} → "
                "{slower_late_after:1}, in truth {slower_early_true:1} → {slower_late_true:1} s.",
                {"compared": (4, 4)},
            ),
            Said("They came too seldom to compare the first third of the season with the last."),
        ),
        (
            Said(
                "In the raw times the one who gets faster seems to stand still, because more of that runner's last "
                "days were hot.",
                {"seems": (-1, 1), "heat_later": (1, 99), "faster_late_true": (-99, -2)},
            ),
            Said(""),
        ),
    ),
    "trend-alt": (
        (
            Said(
                "Two runners' times by day. Raw, both jump with the weather. After batch norm one falls and the other "
                "rises, as in the truth.",
                {"difference": (5, 99), "falls": (1, 99), "rises": (1, 99)},
            ),
            Said("Two runners' times by day: raw, after batch norm, and their true form."),
        ),
    ),
}
