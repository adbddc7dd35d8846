"""Say the sentences of `texts.py` for a season: choose those that are true of it, and put its numbers in.

The page carries the table of texts, and its script `templates/words.js` chooses and fills in as this module does.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from batchnorm.explain._steps import small
from batchnorm.explain.runners import BASE, COOL, DAYS, PER_DEGREE, WIDENING, Season, extremes, visible
from batchnorm.explain.texts import TEXTS

__all__ = ["as_text", "numbers", "say", "table"]

_PARTS = 3  # of the season: early, middle, late


def say(name: str, found: Season) -> str:
    """Return a text with what is true of this season.

    Example:
        >>> from batchnorm.explain.runners import Settings, season
        >>> say("scale-caption", season(Settings(gamma=0)))
        'With γ = 0 all that is left is a line at β.'
    """
    known = numbers(found)
    chosen = (next(said for said in wordings if _holds(said.when, known)) for wordings in TEXTS[name])
    return " ".join(filter(None, (_filled(said.text, known) for said in chosen)))


def table() -> dict[str, list[list[dict[str, Any]]]]:
    """Return all the texts as plain lists, for the page's script."""
    return {
        name: [[asdict(said) for said in wordings] for wordings in sentences]
        for name, sentences in TEXTS.items()
    }


def numbers(found: Season) -> dict[str, float | str]:
    """Return what the texts speak of; what does not exist, as a correlation with nothing, is left out."""
    at = found.settings
    result: dict[str, float | str] = {
        "difference": at.difference,
        "hot": COOL + at.difference,
        "trend": at.trend,
        "runners": at.runners,
        "gamma": at.gamma,
        "beta": at.beta,
        "eps": small(at.eps, 2),
    }
    if found.before is not None:
        result["before"] = found.before
        result["hidden"] = (_without_heat(found) or 0.0) - found.before
    if found.before is not None and found.after is not None:
        result |= {"after": found.after, "gain": found.after - found.before}
    spread = found.var.sqrt()
    for name, kind in (("cool", 0), ("hot", 1)):
        result[f"{name}_mean"] = found.mean[found.hot == kind].mean().item()
        result[f"{name}_spread"] = spread[found.hot == kind].mean().item()
    result["widening"] = float(result["hot_spread"]) - float(result["cool_spread"])
    left = (found.var / (found.var + at.eps)).sqrt()
    typical = left.sort().values[
        (DAYS - 1) // 2
    ]  # more than half of the days have this spread or a larger one
    result |= {"spread_low": left.min().item(), "spread": typical.item(), "spread_high": left.max().item()}
    return result | _of_the_two(found)


def as_text(value: float, digits: int | None = None) -> str:
    """Return a number with so many decimals, or with those it has, and a true minus sign.

    Example:
        >>> as_text(-0.001, 2), as_text(-2.5, 2), as_text(3.0)
        ('0.00', '−2.50', '3')
    """
    return (f"{value:g}" if digits is None else f"{value:z.{digits}f}").replace("-", "−")


def _holds(when: Mapping[str, tuple[float, float]], known: Mapping[str, float | str]) -> bool:
    return all(
        isinstance(value := known.get(name), int | float) and low <= value <= high
        for name, (low, high) in when.items()
    )


def _filled(text: str, known: Mapping[str, float | str]) -> str:
    def put(match: re.Match[str]) -> str:
        value, digits = known[match[1]], match[2]
        return value if isinstance(value, str) else as_text(value, int(digits) if digits else None)

    return re.sub(r"\{(\w+)(?::(\d))?\}", put, text)


def _without_heat(found: Season) -> float | None:
    """The correlation that the same runs would have, had no day been hot."""
    heat = (PER_DEGREE * found.settings.difference * found.hot)[:, None]
    return visible((found.x - BASE - heat) / (1 + WIDENING * heat), found.form, found.members)


def _of_the_two(found: Season) -> dict[str, float]:
    """How often the two runners of the pictures came, and what they ran early and late in the season."""
    result: dict[str, float] = {}
    compared = 0
    for name, runner in zip(("faster", "slower"), extremes(found), strict=True):
        days, places = found.runs_of(runner)
        result[f"{name}_runs"] = len(days)
        for part, chosen in (("early", days < DAYS // _PARTS), ("late", days >= DAYS - DAYS // _PARTS)):
            if not chosen.any():
                continue
            compared += 1
            heat = found.settings.difference * found.hot[:, None].expand_as(found.x).double()
            kinds = {"raw": found.x, "after": found.y, "true": found.form, "heat": heat}
            for what, values in kinds.items():
                result[f"{name}_{part}_{what}"] = values[days[chosen], places[chosen]].mean().item()
    if compared == len(("faster", "slower")) * len(("early", "late")):
        result |= {
            "seems": result["faster_late_raw"] - result["faster_early_raw"],
            "heat_later": result["faster_late_heat"] - result["faster_early_heat"],
            "falls": result["faster_early_after"] - result["faster_late_after"],
            "rises": result["slower_late_after"] - result["slower_early_after"],
        }
    return result | {"compared": compared}
