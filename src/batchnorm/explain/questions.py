"""Six questions: predict, then see. `settings` are values on the sliders' own scales."""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from batchnorm.explain.runners import WIDENING, Season, Settings, season, visible
from batchnorm.explain.words import as_text
from batchnorm.report.document import Question

__all__ = ["SHOWN", "asked", "questions"]

# The two pictures that stand side by side in an answer: at which settings, and of what.
SHOWN: Mapping[str, tuple[tuple[str, str], tuple[str, str]]] = MappingProxyType(
    {
        "cool": (("start", "x"), ("asked", "x")),
        "heat": (("start", "xhat"), ("asked", "xhat")),
        "pair": (("start", "xhat"), ("asked", "xhat")),
        "eps": (("start", "xhat"), ("asked", "xhat")),
        "scale": (("start", "y"), ("asked", "y")),
        "weather": (("asked", "x"), ("asked", "xhat")),
    }
)

_SETTINGS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "cool": {"difference": 0},
        "heat": {"difference": 25},
        "pair": {"runners": 2},
        "eps": {"eps": 3},
        "scale": {"gamma": 6, "beta": 80},
        "weather": {"difference": 25},
    }
)


def asked(name: str) -> Season:
    """Return the season at a question's settings."""
    values: dict[str, Any] = dict(_SETTINGS[name])
    if "eps" in values:  # its slider is logarithmic
        values["eps"] = 10.0 ** values["eps"]
    return season(Settings(**values))


@cache
def questions() -> tuple[Question, ...]:
    """Return the questions of the page's end, in an order that builds up.

    Example:
        >>> len(questions())
        6
    """
    return (*_about_the_data(), *_about_the_constants(), _about_the_weather())


def without_heat(found: Season) -> float | None:
    """The correlation if each day were divided not by its σ but by what heat alone does to the spread."""
    heat = found.settings.difference * found.hot[:, None]
    return visible((found.x - found.mean[:, None]) / (1 + WIDENING * heat), found.form, found.members)


def _about_the_data() -> tuple[Question, ...]:
    usual, cool, pair = season(), asked("cool"), asked("pair")
    return (
        Question(
            "cool",
            "1. No heat at all: the temperature difference goes to 0. How well do raw times now tell who improves?",
            ("As badly as before", "Almost perfectly", "Worse than before"),
            1,
            f"The heat was nearly all that stood in the way: the correlation of raw times is {_two(cool.before)} "
            f"instead of {_two(usual.before)}. Batch norm does not help here and even costs a little "
            f"({_two(cool.after)}): a day's mean depends on who came, and σ also holds how far apart the runners "
            "truly are, which changes over the season.",
            _SETTINGS["cool"],
        ),
        Question(
            "heat",
            "2. Hot days become 25 °C hotter than cool ones. What happens to the normalized times?",
            ("They get as confusing as the raw ones", "They get a little worse", "Nothing"),
            2,
            "Not one dot moves by as much as 0.0001. Heat moves and stretches all times of a day alike: the mean takes "
            "off the one, σ the other, however large they are.",
            _SETTINGS["heat"],
        ),
        Question(
            "pair",
            "3. Only two runners come each day. What are their normalized times?",
            ("−1 and +1, every day", "Closer to the true form", "Both 0"),
            0,
            "Two values always lie one σ on either side of their mean. How far apart they were is lost, and who one "
            f"was paired with decides. The correlation falls from {_two(usual.after)} to {_two(pair.after)}: the "
            "smaller the batch, the noisier its mean and variance.",
            _SETTINGS["pair"],
        ),
    )


def _about_the_constants() -> tuple[Question, ...]:
    usual, eps = season(), asked("eps")
    largest = eps.xhat.abs().max().item()
    return (
        Question(
            "eps",
            "4. ε goes to 1000 s², far above any day's variance. What happens to the normalized times?",
            ("They grow", "They shrink towards 0", "Their mean moves away from 0"),
            1,
            "ε stands beside the variance under the root, so every day is divided by about √1000 ≈ 32: no number is "
            f"farther from 0 than {as_text(largest, 2)}. One divisor for all days means that only the mean is still "
            f"taken off. In this season that even raises the correlation, from {_two(usual.after)} to "
            f"{_two(eps.after)}. σ holds more than heat here: the true form lies closest together in the middle of "
            "the season, and dividing by σ hides that. Divided by what heat alone does to the spread, it would be "
            f"{_two(without_heat(usual))}. ε is there to keep the division safe where σ is 0, and should be small "
            "beside the variance.",
            _SETTINGS["eps"],
        ),
        Question(
            "scale",
            "5. γ goes from 3 to 6, β from 90 to 80. Does the coach see more of each runner's form?",
            ("Yes, twice as much", "Less, because β is lower", "Just as much, on another scale"),
            2,
            f"γ and β change the unit and nothing else: the correlation stays at {_two(usual.after)}. Only γ = 0 would "
            "wipe everything out, since then every output is β: try it.",
            _SETTINGS["scale"],
        ),
    )


def _about_the_weather() -> Question:
    found = asked("weather")
    cool, hot = (found.mean[found.hot == kind].mean().item() for kind in (0, 1))
    return Question(
        "weather",
        "6. Hot days are 25 °C hotter, and someone sees the normalized times only. Can they tell which days were hot?",
        (
            "Yes, hot days are higher",
            "Only because the heat is so great",
            "No, every day has mean 0 and spread 1",
        ),
        2,
        f"In the raw times hot days lie at {as_text(hot, 0)} s and cool ones at {as_text(cool, 0)} s; normalized, both "
        "lie at 0. That is what was taken away. Whoever wanted to learn about the weather has lost it, and so has a "
        "network that is shown one day per batch: the bikes above.",
        _SETTINGS["weather"],
    )


def _two(value: float | None) -> str:
    return "none" if value is None else as_text(value, 2)
