"""What a report says and shows of the training itself: three old questions, answered by measurement."""

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from batchnorm.comparison.claims import LARGE_RATIO, TOO_FEW
from batchnorm.comparison.dynamics import STEP_LENGTHS, Compared, Course, Dynamics, Point
from batchnorm.comparison.figures import band, layout
from batchnorm.comparison.measures import Interval
from batchnorm.comparison.wording import NO_DIFFERENCE
from batchnorm.report.document import Block, Figure, Paragraph, Section, Table

__all__ = ["changed", "training_section"]

LARGE_COSINE = 0.1  # an observed difference of this size that may be chance is called undecided

ROWS = {
    "drift": "drift of what enters an activation (half widths)",
    "shift": "internal covariate shift ‖G − G′‖",
    "relative": "relative to the gradient, ‖G − G′‖/‖G‖",
    "cosine": "cosine of G and G′",
    "variation": "range of the loss along the gradient",
    "change": "change of the gradient, ‖g′ − g‖/‖g‖",
    "beta": "β-smoothness, ‖g′ − g‖/‖η·g‖",
}


def training_section(found: Dynamics) -> Section:
    """The answers, the numbers that they rest on, and the figures."""
    answers = [_drift(found), _shift(found), _smooth(found)]
    figures = [_distribution(found), _shifts(found), _losses(found), _betas(found)]
    blocks: list[Block] = [
        *(Paragraph(text) for text in [_diverged(found), *answers] if text),
        _table(found),
        *(figure for figure in figures if figure is not None),
    ]
    return Section("During training", blocks)


def _diverged(found: Dynamics) -> str:
    """How many of the watched trainings came to nothing; then no claim is made."""
    counts = [sum(c.diverged for c in found.courses if c.normalized == side) for side in (True, False)]
    if not any(counts):
        return ""
    seeds = len(found.courses) // 2
    return (
        f"Caution: of the {seeds} watched trainings of each network {counts[0]} with batch norm and {counts[1]} "
        "without diverged, so the numbers below are those of a training that ended early, and the networks are not "
        "compared."
    )


def _drift(found: Dynamics) -> str:
    item = found.measure("drift")
    question = "Does what enters an activation hold still?"
    if not _known(item):
        return f"{question} It could not be seen at this place."
    text = (
        f"{question} At {found.place} the median moves from one evaluation to the next by {_pair(item)}, in units of "
        f"half the distance between the 15th and the 85th percentile: {_change(item)}."
    )
    if item.change is not None and item.change.excludes(1) and item.change.mean < 1:
        text += (
            " In part that is so by construction: batch norm sets mean and spread, and only its weight and bias move "
            "them."
        )
    return text


def _shift(found: Dynamics) -> str:
    item, relative, cosine = (found.measure(name) for name in ("shift", "relative", "cosine"))
    question = "Is internal covariate shift smaller, as Ioffe and Szegedy supposed?"
    if not _known(item):
        return f"{question} It could not be measured: no layer has trained layers before it."
    return (
        f"{question} By the definition of Santurkar et al. (2018): take the gradient G of a layer's weights on a "
        "batch, let only the layers before it make their step, and take the gradient again, G′. ‖G − G′‖ is "
        f"{_pair(item)}: {_change(item)}. It grows with the gradient; relative to it, ‖G − G′‖/‖G‖ is "
        f"{_pair(relative)}: {_change(relative)}. The cosine of G and G′ is {_pair(cosine)}: {_change(cosine)}."
    )


def _smooth(found: Dynamics) -> str:
    loss, change, beta = (found.measure(name) for name in ("variation", "change", "beta"))
    return (
        "Is the loss smoother along the gradient? With the gradient g of all weights θ on a batch, go to θ − η·g, η "
        f"being {STEP_LENGTHS[0]:g} to {STEP_LENGTHS[-1]:g} times the learning rate. The losses there span "
        f"{_pair(loss)}: {_change(loss)}. The gradient there, g′, differs from g by ‖g′ − g‖/‖g‖ = {_pair(change)}: "
        f"{_change(change)}. By the distance gone that is the β-smoothness, ‖g′ − g‖/‖η·g‖ = {_pair(beta)}: "
        f"{_change(beta)}. Mind that the learning rate is the one that suits the network without batch norm, which a "
        "few times that rate may well throw off, and that a smaller loss spans less."
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
    return not all(map(math.isnan, [*item.normalized, *item.plain]))


def _pair(item: Compared) -> str:
    with_, without = (_number(_middle(values)) for values in (item.normalized, item.plain))
    return f"{with_} with batch norm and {without} without"


def _middle(values: Sequence[float]) -> float:
    """The geometric mean of the known values, or the plain one where a value is not positive."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return math.nan
    if min(known) > 0:
        return math.exp(sum(map(math.log, known)) / len(known))
    return sum(known) / len(known)


def _number(value: float) -> str:
    """Two digits that count."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "infinite"
    if abs(value) >= 1e5:
        return f"{value:.0e}"
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
        return (
            f"{size} ({span})"
            if change.excludes(0)
            else f"{_unseen(abs(change.mean) > LARGE_COSINE)} ({span})"
        )
    word, ratio = ("more", change.mean) if change.mean >= 1 else ("less", 1 / change.mean)
    if change.low is None or change.high is None:
        return f"{_factor(ratio)}× {word} in one seed"
    if not change.excludes(1):
        return f"{_unseen(ratio > LARGE_RATIO)} ({_factor(change.low)} to {_factor(change.high)}×)"
    low, high = (change.low, change.high) if word == "more" else (1 / change.high, 1 / change.low)
    return f"{_factor(ratio)}× {word} ({_factor(low)} to {_factor(high)}×)"


def _unseen(large: bool) -> str:
    """What to say of a difference that may be chance: a large one is undecided, not absent."""
    return TOO_FEW if large else NO_DIFFERENCE


def _factor(value: float) -> str:
    """Near 1 with the digit that tells it from 1."""
    digits = 2 if 0.5 <= value < 1.5 else 1
    if value < 0.1 or value >= 1e5:
        return f"{value:.0e}" if value >= 1e5 else f"{value:.1g}"
    return f"{value:.{digits}f}" if value < 100 else f"{value:.0f}"


def _distribution(found: Dynamics) -> Figure | None:
    first = [course for course in found.courses[:2] if course.percentiles]
    if len(first) < 2:
        return None
    data = [trace for course in first[::-1] for trace in _percentile_band(course)]
    return Figure(
        id="distribution",
        title="What enters an activation, over training",
        data=data,
        layout=layout("training steps", "value"),
        alt=f"The 15th, 50th and 85th percentile of one channel in both networks: {_drift(found)}",
        caption=f"Of {found.place}, and of the same place without batch norm: the 15th, 50th and 85th percentile of "
        f"the channel whose drift is the middle one; seed {first[0].seed}.",
    )


def _percentile_band(course: Course) -> list[dict[str, Any]]:
    low, middle, high = (list(values) for values in zip(*course.percentiles, strict=True))
    return band(list(course.steps), low, high, middle, course.normalized, ", median")


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
        "max ‖g′ − g‖/‖η·g‖",
        "The greatest change of the gradient along itself, by the distance gone.",
        {"dtick": "D2"},  # it moves within a decade or two
    )


def _lines(
    found: Dynamics,
    of: Callable[[Point], float],
    name: str,
    title: str,
    axis: str,
    caption: str,
    ticks: dict[str, Any] | None = None,
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
        middle = [statistics.median(column) for _, column in kept]
        data += band(x, low, high, middle, normalized, "")
    seeds = len(found.courses) // 2
    spread = (
        f" The median of {seeds} seeds; the band reaches from the lowest to the highest." if seeds > 1 else ""
    )
    return Figure(
        id=name,
        title=title,
        data=data,
        layout=layout("training steps", axis, {"type": "log", **(ticks or {})}),
        alt=f"{title} of both networks over training, on a logarithmic axis.",
        caption=caption + spread,
    )


def _losses(found: Dynamics) -> Figure | None:
    data: list[dict[str, Any]] = []
    for course in found.courses[:2][::-1]:
        points = [p for p in course.points if p.low > 0 and p.high < math.inf]
        if not points:
            return None
        data += band(
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
        f"{STEP_LENGTHS[-1]:g} times the learning rate along the gradient; the line, the loss before the step, lies "
        "above the band where every step leads down; seed "
        f"{found.courses[0].seed}.",
    )
