"""The made-up season: runners whose true form is known, and what heat makes of their times.

Every number here is invented, so that there is a truth to compare with. 24 runners train over 40 days. Half of them
get faster at their own pace, half slower; that, and where each of them started, is the true form: seconds against
the squad's average on a cool day. What the coach writes down is

    time = 90 + heat + (1 + 0.03·heat)·(form + noise),    heat = 1 second a degree above 15 °C on a hot day,

so heat slows everyone and drives the field apart. Each day some of the runners come, in an order that is fixed: with
fewer runners a day the first of that order come.
"""

import random
from dataclasses import asdict, dataclass, fields
from functools import cache
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from batchnorm._errors import InputError, message
from batchnorm.explain._steps import four_steps

__all__ = [
    "BASE",
    "COOL",
    "DAYS",
    "LINE_FROM",
    "PER_DEGREE",
    "RUNNERS",
    "WIDENING",
    "Draws",
    "Season",
    "Settings",
    "draws",
    "extremes",
    "season",
    "visible",
]

RUNNERS, DAYS = 24, 40
BASE = 90.0  # s for the interval on a cool day
COOL = 15.0  # °C
NOISE = 0.5  # s
PER_DEGREE = 1.0  # s/°C
WIDENING = 0.03  # of the field, per second of heat
LINE_FROM = 3  # runs; a runner with fewer makes no line
_SEED = 2  # hot days fall evenly on both halves of the season


@dataclass(frozen=True)
class Settings:
    """What the sliders move.

    Args:
        difference: how much hotter a hot day is, °C.
        trend: how fast the fastest-changing runner's form changes, s a day.
        runners: runners a day, the batch size, 2 to 24.
        eps: ε, s².
        gamma: γ.
        beta: β.

    Raises:
        InputError: a value outside what the season can be computed for.
    """

    difference: float = 15.0
    trend: float = 0.15
    runners: int = 16
    eps: float = 1e-5
    gamma: float = 3.0
    beta: float = 90.0

    def __post_init__(self) -> None:
        if not 2 <= self.runners <= RUNNERS:
            raise InputError(message("runners", got=self.runners, expected=f"2 to {RUNNERS}"))
        if not self.eps > 0:
            raise InputError(message("eps", got=self.eps, expected="above 0"))


@dataclass(frozen=True)
class Draws:
    """The random numbers of the season, drawn once.

    Args:
        level: where each runner stands, s.
        pace: how each changes, −1 to 1; negative gets faster.
        hot: 1 for a hot day.
        noise: standard normals, (days, runners).
        order: who comes first, (days, runners).
    """

    level: tuple[float, ...]
    pace: tuple[float, ...]
    hot: tuple[int, ...]
    noise: tuple[tuple[float, ...], ...]
    order: tuple[tuple[int, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers, and the constants of the formula, for whoever computes the season elsewhere."""
        constants = {"base": BASE, "cool": COOL, "noiseScale": NOISE, "perDegree": PER_DEGREE}
        return {**asdict(self), **constants, "widening": WIDENING, "lineFrom": LINE_FROM}


@cache
def draws() -> Draws:
    """Return the season's random numbers: the same on every machine.

    Only `random()` is asked, the one method whose stream Python promises to keep.

    Example:
        >>> draws().level[:3]
        (1.706, 1.624, -1.584)
        >>> sum(draws().hot)
        20
    """
    uniform = random.Random(_SEED).random
    normal = NormalDist().inv_cdf

    def numbers(count: int) -> tuple[float, ...]:
        return tuple(round(normal(uniform()), 3) for _ in range(count))

    def shuffled(items: list[int]) -> tuple[int, ...]:
        return tuple(sorted(items, key=lambda _: uniform()))

    level = numbers(RUNNERS)
    pace = tuple((-1) ** (runner + 1) * round(0.5 + uniform() / 2, 3) for runner in range(RUNNERS))
    hot = shuffled([1] * (DAYS // 2) + [0] * (DAYS - DAYS // 2))
    noise = tuple(numbers(RUNNERS) for _ in range(DAYS))
    order = tuple(shuffled(list(range(RUNNERS))) for _ in range(DAYS))
    return Draws(level, pace, hot, noise, order)


@dataclass(frozen=True, eq=False)
class Season:
    """The season as the coach sees it and as it truly was. All tensors are float64.

    Args:
        settings: what it was computed for.
        hot: 1 for a hot day, (D,).
        members: which runners came, (D, n).
        form: their true form that day, s, (D, n); lower is faster.
        x: their times, s, (D, n).
        mean: each day's mean, s, (D,).
        var: each day's variance, s², (D,).
        xhat: the normalized times, (D, n).
        y: γ·x̂ + β, (D, n).
    """

    settings: Settings
    hot: Tensor
    members: Tensor
    form: Tensor
    x: Tensor
    mean: Tensor
    var: Tensor
    xhat: Tensor
    y: Tensor

    @property
    def before(self) -> float | None:
        """How well raw times tell a runner's form: `visible` of x."""
        return visible(self.x, self.form, self.members)

    @property
    def after(self) -> float | None:
        """How well the output tells it: `visible` of y, which is that of x̂ unless γ is 0."""
        return visible(self.y, self.form, self.members)

    def runs_of(self, runner: int) -> tuple[Tensor, Tensor]:
        """Where one runner's runs stand in the (D, n) tensors: days and places."""
        days, places = (self.members == runner).nonzero(as_tuple=True)
        return days, places

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain lists; correlations are None where there is nothing to correlate."""
        tensors = {
            item.name: getattr(self, item.name).tolist() for item in fields(self) if item.name != "settings"
        }
        return {"settings": asdict(self.settings), "before": self.before, "after": self.after, **tensors}


def season(settings: Settings | None = None) -> Season:
    """Return the season at the given settings; each day is one batch of the library's batch norm.

    Example:
        >>> found = season()
        >>> round(found.before, 2), round(found.after, 2)
        (0.21, 0.87)
    """
    given, drawn = settings or Settings(), draws()
    members = torch.tensor(drawn.order)[:, : given.runners]
    level, pace, noise = (
        torch.tensor(values, dtype=torch.float64) for values in (drawn.level, drawn.pace, drawn.noise)
    )
    day = torch.arange(DAYS, dtype=torch.float64)[:, None] - (DAYS - 1) / 2
    hot = torch.tensor(drawn.hot)
    heat = (PER_DEGREE * given.difference * hot)[:, None]
    form = level[members] + given.trend * pace[members] * day
    x = BASE + heat + (1 + WIDENING * heat) * (form + NOISE * noise.gather(1, members))
    gamma, beta = (torch.tensor([value], dtype=torch.float64) for value in (given.gamma, given.beta))
    # One channel, the days as groups: (D·n, 1).
    steps = four_steps(x.reshape(-1, 1), gamma, beta, given.eps, groups=DAYS)
    xhat, y = steps.xhat.reshape(x.shape), steps.y.reshape(x.shape)
    return Season(given, hot, members, form, x, steps.mean[:, 0], steps.var[:, 0], xhat, y)


def extremes(found: Season) -> tuple[int, int]:
    """The runner whose form improves most and the one whose form declines most, of those who came often enough.

    Example:
        >>> extremes(season()), extremes(season(Settings(runners=2)))
        ((20, 9), (12, 9))
    """
    runs = torch.bincount(found.members.flatten(), minlength=RUNNERS)
    pace = draws().pace
    often = [runner for runner in range(RUNNERS) if runs[runner] >= LINE_FROM]
    return min(often, key=pace.__getitem__), max(often, key=pace.__getitem__)


def visible(values: Tensor, form: Tensor, members: Tensor) -> float | None:
    """The correlation of what is measured with the true form, run by run, each less its runner's own average.

    So a good runner earns nothing for being good; only the changes of form count. None where nothing changes.
    """
    a, b = _less_own_average(values, members), _less_own_average(form, members)
    scale = (a.square().sum() * b.square().sum()).sqrt().item()
    # Below this a spread is rounding: β = 90 is kept to 1e-14 of itself.
    if scale < 1e-9:
        return None
    return float((a * b).sum().item() / scale)


def _less_own_average(values: Tensor, members: Tensor) -> Tensor:
    flat, who = values.flatten(), members.flatten()
    sums = torch.zeros(RUNNERS, dtype=torch.float64).index_add_(0, who, flat)
    counts = torch.bincount(who, minlength=RUNNERS).clamp(min=1)
    return (flat - (sums / counts)[who]).reshape(values.shape)
