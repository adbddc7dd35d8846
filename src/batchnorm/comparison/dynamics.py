"""What happens during training: the same two trainings once more, watched."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from batchnorm.comparison.distribution import Percentiles, Side, drift, typical
from batchnorm.comparison.footing import How, called_norms, place_without
from batchnorm.comparison.gradients import (
    Group,
    Probe,
    Shift,
    Smoothness,
    covariate_shift,
    layers_of,
    smoothness,
)
from batchnorm.comparison.measures import Interval, ratio_interval, t_interval
from batchnorm.comparison.pairs import given
from batchnorm.comparison.tasks import Task

__all__ = [
    "MEASURES",
    "SAMPLES",
    "STEP_LENGTHS",
    "Course",
    "Dynamics",
    "Measure",
    "Point",
    "Watch",
    "place_of",
    "put_together",
]

# Gradients are compared at so many steps of a training: the first, the last, and between them denser at the beginning,
# where networks differ most: half of them lie in the first quarter.
PROBES = 20
# Layers at which the shift of the gradient is measured, evenly apart; the first has nothing before it.
LAYERS = 4
# Along the gradient, in units of the learning rate.
STEP_LENGTHS = (0.5, 1.0, 2.0, 4.0)
# Samples whose distribution is looked at; the same ones at every evaluation.
SAMPLES = 256


@dataclass(frozen=True)
class Point:
    """What one training step was like.

    Args:
        step: its number, from 1 on.
        loss: the loss before it.
        low: the lowest loss along the gradient, at the step lengths 1/2 to 4 times the learning rate.
        high: the highest.
        change: max ‖g′ − g‖₂/‖g‖₂ over these step lengths: how little the gradient says about where a step leads.
        beta: max ‖g′ − g‖₂/‖η·g‖₂: the effective β-smoothness.
        shift: ‖G − G′‖₂, the internal covariate shift, the median of the layers measured.
        relative: ‖G − G′‖₂/‖G‖₂, the median of the layers.
        cosine: of G and G′, the median of the layers.
    """

    step: int
    loss: float
    low: float
    high: float
    change: float
    beta: float
    shift: float
    relative: float
    cosine: float

    @property
    def variation(self) -> float:
        """The range of the loss along the gradient."""
        return self.high - self.low


@dataclass(frozen=True)
class Course:
    """One watched training.

    Args:
        normalized: with batch norm or without.
        seed: its seed.
        steps: the steps at which the distribution was looked at.
        percentiles: the 15th, 50th and 85th percentile of the typical channel at these steps.
        drift: how far the median moves from one evaluation to the next, in units of half the distance of the outer
            two; the middle one of all channels. NaN where the place was not seen.
        points: the steps at which gradients were compared.
        diverged: the training loss became NaN or infinite, and the training ended there.
    """

    normalized: bool
    seed: int
    steps: tuple[int, ...]
    percentiles: tuple[tuple[float, float, float], ...]
    drift: float
    points: tuple[Point, ...]
    diverged: bool = False


Scale = Literal["ratio", "difference"]


@dataclass(frozen=True)
class Measure:
    """One number of a course: `of` gives it, NaN where it is not known, and two networks are compared on `scale`."""

    name: str
    of: Callable[[Course], float]
    scale: Scale = "ratio"


@dataclass(frozen=True)
class Compared:
    """A measure of both networks.

    Args:
        name: "drift", "shift", "relative", "cosine", "variation", "change" or "beta": see `Course` and `Point`. Of
            the points of a course the median counts.
        normalized: with batch norm, for each seed.
        plain: without.
        scale: how the two are compared.
        change: the ratio with over without, or the difference with minus without, over the seeds; None where a
            training diverged, or one of the numbers is missing, infinite or, for a ratio, not positive.
    """

    name: str
    normalized: tuple[float, ...]
    plain: tuple[float, ...]
    scale: Scale
    change: Interval | None


@dataclass(frozen=True)
class Dynamics:
    """The two networks during training, both at the same learning rate.

    Args:
        lr: learning rate of both: the one at which the plain network scores best.
        place: where the distribution was looked at, in words.
        layers: the layers at which the shift of the gradient was measured, as the network with batch norm calls them.
        courses: the watched trainings, without and with batch norm for each seed.
        compared: the measures, over the seeds.
    """

    lr: float
    place: str
    layers: tuple[str, ...]
    courses: tuple[Course, ...]
    compared: tuple[Compared, ...]

    def measure(self, name: str) -> Compared:
        """One of the measures, by its name."""
        return next(item for item in self.compared if item.name == name)


def _median(values: Iterable[float]) -> float:
    """The median of the values that are known: an infinite one counts, a NaN does not."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def _of_points(get: Callable[[Point], float]) -> Callable[[Course], float]:
    return lambda course: _median(get(point) for point in course.points)


MEASURES = (
    Measure("drift", lambda course: course.drift),
    Measure("shift", _of_points(lambda point: point.shift)),
    Measure("relative", _of_points(lambda point: point.relative)),
    Measure("cosine", _of_points(lambda point: point.cosine), scale="difference"),
    Measure("variation", _of_points(lambda point: point.variation)),
    Measure("change", _of_points(lambda point: point.change)),
    Measure("beta", _of_points(lambda point: point.beta)),
)


@dataclass(frozen=True)
class Place:
    """Where a distribution is looked at: a module's path and side in one of the two networks."""

    path: str
    side: Side
    words: str


def place_of(normalized: nn.Module, how: How, x: Tensor) -> tuple[Place, Place] | None:
    """The output of the middle batch norm, without and with batch norm; None where no batch norm is called."""
    called = called_norms(normalized, given(normalized, x))
    if not called:
        return None
    path = called[len(called) // 2]
    words = f"what batch norm {len(called) // 2 + 1} of {len(called)} ({path}) hands on"
    plain_path, plain_side = place_without(how, path)
    return Place(plain_path, plain_side, words), Place(path, "output", words)


class Watch:
    """Looks on while one network trains; nothing that it does changes the training.

    Args:
        place: where the distribution is looked at; None for nowhere.
        sample: the inputs whose distribution is looked at, (N, *features).
        task: what is learned.
        lr: the learning rate.
        steps: training steps in all.
        seed: seeds what is random inside the network.
    """

    def __init__(
        self, place: Place | None, sample: Tensor, task: Task, lr: float, steps: int, seed: int
    ) -> None:
        self._task, self._seed = task, seed
        self._lengths = tuple(lr * length for length in STEP_LENGTHS)
        self._probed = {1 + round((steps - 1) * (at / (PROBES - 1)) ** 2) for at in range(PROBES)}
        self._recorder = None if place is None else Percentiles(place.path, place.side, sample[:SAMPLES])
        self._evaluated: list[int] = []
        self._points: list[Point] = []
        self._before: dict[str, Tensor] | None = None
        self.groups: tuple[Group, ...] = ()

    def evaluated(self, step: int, model: nn.Module) -> None:
        """Look at the distribution, at step 0 and wherever the network is evaluated."""
        if self._recorder is not None:
            self._recorder.observe(model)
            self._evaluated.append(step)

    def before(self, step: int, model: nn.Module) -> None:
        """Keep the weights before a step that will be looked at."""
        self._before = _parameters(model) if step in self._probed else None

    def after(self, step: int, model: nn.Module, x: Tensor, y: Tensor) -> None:
        """Compare gradients before and after the step."""
        if self._before is None:
            return
        old, self._before = self._before, None
        if not self._points:
            self.groups = _some(layers_of(model, x))
        start = Probe(model, x, y, self._loss, self._seed + step).start(old)
        shifts = covariate_shift(start, _parameters(model), self.groups)
        smooth = smoothness(start, self._lengths)
        self._points.append(_point(step, shifts, smooth))

    def course(self, normalized: bool, *, diverged: bool = False) -> Course:
        """What was seen."""
        steps, curve, moved = _typical(self._evaluated, self._recorder)
        return Course(normalized, self._seed, steps, curve, moved, tuple(self._points), diverged)

    def _loss(self, output: Tensor, y: Tensor) -> Tensor:
        fitted = self._task.fit(output, y, self._task.width(y))
        return self._task.loss(output if fitted is None else fitted, y)


def put_together(lr: float, place: str, layers: Sequence[str], courses: Sequence[Course]) -> Dynamics:
    """The finished pairs of courses with their comparison.

    Args:
        lr: the learning rate of all of them.
        place: where the distribution was looked at, in words.
        layers: where the shift was measured.
        courses: one without and one with batch norm for each seed, in this order.
    """
    compared = tuple(_compared(measure, courses) for measure in MEASURES)
    return Dynamics(lr, place, tuple(layers), tuple(courses), compared)


def _compared(measure: Measure, courses: Sequence[Course]) -> Compared:
    with_ = tuple(measure.of(course) for course in courses if course.normalized)
    without = tuple(measure.of(course) for course in courses if not course.normalized)
    change = None
    if all(map(math.isfinite, [*with_, *without])) and not any(course.diverged for course in courses):
        if measure.scale == "difference":
            change = t_interval([a - b for a, b in zip(with_, without, strict=True)]).clipped(-2, 2)
        elif min(*with_, *without) > 0:
            change = ratio_interval(with_, without)
    return Compared(measure.name, with_, without, measure.scale, change)


def _typical(
    steps: Sequence[int], recorder: Percentiles | None
) -> tuple[tuple[int, ...], tuple[tuple[float, float, float], ...], float]:
    """The curve of the channel whose drift is the middle one, and that drift."""
    if recorder is None:
        return (), (), math.nan
    drifts = drift(recorder.curves)
    channel = typical(drifts)
    if channel is None:
        return (), (), math.nan
    curve = recorder.curves[:, :, channel].tolist()
    return tuple(steps), tuple((low, middle, high) for low, middle, high in curve), float(drifts[channel])


def _some(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """Some of the layers that have others before them, evenly apart, the last one included."""
    later = [group for group in groups if group.before]
    count = min(LAYERS, len(later))
    return tuple(later[(at + 1) * len(later) // count - 1] for at in range(count))


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def _point(step: int, shifts: Sequence[Shift], smooth: Smoothness) -> Point:
    return Point(
        step,
        smooth.loss,
        smooth.loss_low,
        smooth.loss_high,
        smooth.relative,
        smooth.beta,
        _median(shift.difference for shift in shifts),
        _median(shift.relative for shift in shifts),
        _median(shift.cosine for shift in shifts),
    )
