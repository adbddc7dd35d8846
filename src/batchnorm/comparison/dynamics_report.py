"""What a report says and shows of the training itself: three old questions, answered by measurement."""

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from batchnorm.comparison.dynamics import STEP_LENGTHS, Compared, Course, Dynamics, Point
from batchnorm.comparison.figures import COLOURS, DASHES, NAMES, layout
from batchnorm.comparison.measures import Interval
from batchnorm.comparison.wording import NO_DIFFERENCE
from batchnorm.report.document import Block, Figure, Paragraph, Section, Table

__all__ = ["changed", "training_section"]

ROWS = {
    "drift": "drift of the distribution (half widths an evaluation)",
    "shift": "internal covariate shift ‖G − G′‖",
    "relative": "the same beside the gradient, ‖G − G′‖/‖G‖",
    "cosine": "cosine of G and G′",
    "variation": "range of the loss along the gradient",
    "change": "change of the gradient, ‖g′ − g‖/‖g‖",
    "beta": "β-smoothness, ‖g′ − g‖/‖ηg‖",
}


def training_section(found: Dynamics) -> Section:
    """The answers, the numbers that they rest on, and the figures."""
    answers = [_drift(found), _shift(found), _smooth(found)]
    figures = [_distribution(found), _shifts(found), _losses(found), _betas(found)]
    blocks: list[Block] = [
        *(Paragraph(answer) for answer in answers),
        _table(found),
        *(figure for figure in figures if figure is not None),
    ]
    return Section("During training", blocks)


def _drift(found: Dynamics) -> str:
    item = found.measure("drift")
    question = "Does a hidden layer's input hold still?"
    if not _known(item):
        return f"{question} It could not be seen at this place."
    return (
        f"{question} From one evaluation to the next its median moves by {_pair(item)} (in half widths of "
        f"the distribution): {_change(item)}. In part that is so by construction, as batch norm sets mean and spread "
        "and training moves only its weight and bias."
    )


def _shift(found: Dynamics) -> str:
    item, relative, cosine = (found.measure(name) for name in ("shift", "relative", "cosine"))
    question = "Is internal covariate shift smaller, as the original paper supposed?"
    if not _known(item):
        return f"{question} It could not be measured: no layer has trained layers before it."
    return (
        f"{question} By its published definition, how far the updates of earlier layers move a layer's gradient, it "
        f"is {_pair(item)}: {_change(item)}. That grows with the gradient itself; beside it the shift is "
        f"{_pair(relative)}: {_change(relative)}. The cosine of the two gradients is {_pair(cosine)}: "
        f"{_change(cosine)}."
    )


def _smooth(found: Dynamics) -> str:
    loss, change, beta = (found.measure(name) for name in ("variation", "change", "beta"))
    return (
        f"Is the loss smoother along the gradient? At {STEP_LENGTHS[0]:g} to {STEP_LENGTHS[-1]:g} times the learning "
        f"rate the loss varies by {_pair(loss)}: {_change(loss)}. The gradient changes, in units of its own "
        f"size, by {_pair(change)}: {_change(change)}. Divided by "
        f"the distance that is the β-smoothness, {_pair(beta)}: {_change(beta)}."
    )


def _table(found: Dynamics) -> Table:
    rows = [
        [ROWS[item.name], _number(_middle(item.normalized)), _number(_middle(item.plain)), _change(item)]
        for item in found.compared
    ]
    seeds = len(found.courses) // 2
    return Table(
        columns=("median over the training", "with", "without", "with batch norm"),
        rows=rows,
        caption=f"Both networks at the learning rate {found.lr:g}, at which the plain one does best. "
        + (
            f"Over {seeds} seeds, geometric means (of the cosine plain ones), with the 95 % interval of the change."
            if seeds > 1
            else "One seed, hence no intervals."
        ),
        numeric=(1, 2),
    )


def _known(item: Compared) -> bool:
    return not any(map(math.isnan, [*item.normalized, *item.plain]))


def _pair(item: Compared) -> str:
    with_, without = (_number(_middle(values)) for values in (item.normalized, item.plain))
    return f"{with_} with batch norm and {without} without"


def _middle(values: Sequence[float]) -> float:
    """The geometric mean, or the plain one where a value is not positive."""
    if min(values) > 0:
        return math.exp(sum(map(math.log, values)) / len(values))
    return sum(values) / len(values)


def _number(value: float) -> str:
    """Two digits that count."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "infinite"
    return f"{value:.2g}".replace("-", "−") if abs(value) < 100 else f"{value:.0f}"


def _change(item: Compared) -> str:
    return changed(item.change, item.scale)


def changed(change: Interval | None, scale: str) -> str:
    """How the network with batch norm differs, "5.5× less (3.1 to 9.8×)", where that is more than chance."""
    if change is None:
        return "not comparable"
    if scale == "difference":
        size = f"{change.mean:+.2f}".replace("-", "−")
        if change.low is None or change.high is None:
            return f"{size} in one seed"
        span = f"{change.low:+.2f} to {change.high:+.2f}".replace("-", "−")
        return f"{size} ({span})" if change.excludes(0) else f"{NO_DIFFERENCE} ({span})"
    word, ratio = ("more", change.mean) if change.mean >= 1 else ("less", 1 / change.mean)
    if change.low is None or change.high is None:
        return f"{_factor(ratio)}× {word} in one seed"
    if not change.excludes(1):
        return f"{NO_DIFFERENCE} ({_factor(change.low)} to {_factor(change.high)}×)"
    low, high = (change.low, change.high) if word == "more" else (1 / change.high, 1 / change.low)
    return f"{_factor(ratio)}× {word} ({_factor(low)} to {_factor(high)}×)"


def _factor(value: float) -> str:
    """Near 1 with the digit that tells it from 1."""
    digits = 2 if 0.5 <= value < 1.5 else 1
    return f"{value:.{digits}f}" if 0.1 <= value < 100 else f"{value:.1g}" if value < 0.1 else f"{value:.0f}"


def _distribution(found: Dynamics) -> Figure | None:
    first = [course for course in found.courses[:2] if course.percentiles]
    if len(first) < 2:
        return None
    data = [trace for course in first[::-1] for trace in _percentile_band(course)]
    return Figure(
        id="distribution",
        title="The distribution of a hidden layer's input over training",
        data=data,
        layout=layout("training steps", "value"),
        alt=f"The 15th, 50th and 85th percentile of one channel in both networks: {_drift(found)}",
        caption=f"Of {found.place}, and of the same place without batch norm: the 15th, 50th and 85th percentile of "
        f"the channel whose drift is the middle one; seed {first[0].seed}.",
    )


def _percentile_band(course: Course) -> list[dict[str, Any]]:
    low, middle, high = (list(values) for values in zip(*course.percentiles, strict=True))
    return _filled(list(course.steps), low, high, middle, course.normalized, ", median")


def _filled(
    x: list[int],
    low: list[float],
    high: list[float],
    middle: list[float],
    normalized: bool,
    suffix: str,
) -> list[dict[str, Any]]:
    colour = COLOURS[normalized]
    edge = {
        "type": "scatter",
        "mode": "lines",
        "x": x,
        "line": {"width": 0, "color": colour},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    line = {
        "type": "scatter",
        "mode": "lines",
        "x": x,
        "y": middle,
        "name": f"{NAMES[normalized]}{suffix}",
        "line": {"color": colour, "dash": DASHES[normalized], "width": 2},
    }
    return [
        {**edge, "y": low},
        {**edge, "y": high, "fill": "tonexty", "fillcolor": f"{colour}-band"},
        line,
    ]


def _shifts(found: Dynamics) -> Figure | None:
    return _lines(
        found,
        lambda point: point.shift,
        "shift",
        "Internal covariate shift, by its gradient definition",
        "‖G − G′‖",
        "How far the updates of earlier layers move the gradient of a layer: the median of the layers "
        f"{', '.join(found.layers)}.",
    )


def _betas(found: Dynamics) -> Figure | None:
    return _lines(
        found,
        lambda point: point.beta,
        "smoothness",
        "Effective β-smoothness",
        "max ‖g′ − g‖/‖ηg‖",
        "The greatest change of the gradient along itself, by the distance.",
    )


def _lines(
    found: Dynamics, of: Callable[[Point], float], name: str, title: str, axis: str, caption: str
) -> Figure | None:
    """One quantity over training: the median of the seeds, and a band from the lowest to the highest."""
    data: list[dict[str, Any]] = []
    for normalized in (True, False):
        points = sorted(
            (point.step, of(point))
            for course in found.courses
            if course.normalized == normalized
            for point in course.points
        )
        kept = [
            (step, [value for _, value in column if 0 < value < math.inf])
            for step, column in groupby(points, key=itemgetter(0))
        ]
        kept = [(step, column) for step, column in kept if column]
        if not kept:
            return None
        x = [step for step, _ in kept]
        low, high = [column[0] for _, column in kept], [column[-1] for _, column in kept]
        middle = [column[(len(column) - 1) // 2] for _, column in kept]
        data += _filled(x, low, high, middle, normalized, "")
    seeds = len(found.courses) // 2
    band = (
        f" The median of {seeds} seeds; the band reaches from the lowest to the highest." if seeds > 1 else ""
    )
    return Figure(
        id=name,
        title=title,
        data=data,
        layout=layout("training steps", axis, {"type": "log"}),
        alt=f"{title} of both networks over training, on a logarithmic axis.",
        caption=caption + band,
    )


def _losses(found: Dynamics) -> Figure | None:
    data: list[dict[str, Any]] = []
    for course in found.courses[:2][::-1]:
        points = [p for p in course.points if p.low > 0 and p.high < math.inf]
        if not points:
            return None
        data += _filled(
            [p.step for p in points],
            [p.low for p in points],
            [p.high for p in points],
            [p.loss for p in points],
            course.normalized,
            ", loss before the step",
        )
    return Figure(
        id="landscape",
        title="The loss along the gradient",
        data=data,
        layout=layout("training steps", "training loss", {"type": "log"}),
        alt="The range of the loss along the gradient of both networks, on a logarithmic axis.",
        caption=f"The band reaches from the lowest to the highest loss on the batch at {STEP_LENGTHS[0]:g} to "
        f"{STEP_LENGTHS[-1]:g} times the learning rate along the gradient; the line is the loss before the step; seed "
        f"{found.courses[0].seed}.",
    )
