"""The pictures of the season. The page's script renews their numbers, trace by trace in this order."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from batchnorm.explain.runners import DAYS, Season, extremes
from batchnorm.explain.words import say
from batchnorm.report.document import Figure

__all__ = [
    "mean_picture",
    "normalized_picture",
    "output_picture",
    "raw_picture",
    "trend_picture",
    "variance_picture",
]

Trace = dict[str, Any]


def raw_picture(found: Season) -> Figure:
    """All times of the season, hot days apart from cool ones."""
    return Figure(
        id="raw",
        title="The coach's notebook: every time of the season",
        data=_two_kinds_of_days(found, found.x),
        layout=_layout("time, s", include=[80, 120]),
        alt=say("raw-alt", found),
        caption=say("raw-caption", found),
    )


def mean_picture(found: Season) -> Figure:
    """The times again, and each day's mean."""
    days = _days()
    return Figure(
        id="mean",
        title="Each day's mean",
        data=[
            _dots("a run", *_runs(found, found.x), "muted"),
            _line("the day's mean", days, found.mean.tolist(), "with", width=2.5),
        ],
        layout=_layout("time, s", include=[80, 120]),
        alt=say("mean-alt", found),
        caption=say("mean-caption", found),
    )


def variance_picture(found: Season) -> Figure:
    """What is left without the mean, and each day's spread."""
    days, spread = _days(), found.var.sqrt().tolist()
    return Figure(
        id="variance",
        title="Each day's spread about its mean",
        data=[
            _dots("a run, less the day's mean", *_runs(found, found.x - found.mean[:, None]), "muted"),
            _line("σ, the day's spread", days, spread, "with", width=2.5),
            _line("", days, [-value for value in spread], "with", width=2.5, showlegend=False),
        ],
        layout=_layout("seconds from the mean", include=[-6, 6]),
        alt=say("variance-alt", found),
        caption=say("variance-caption", found),
    )


def normalized_picture(found: Season) -> Figure:
    """The normalized times, hot days and cool ones on one scale."""
    return Figure(
        id="normalize",
        title="The same runs, normalized day by day",
        data=_two_kinds_of_days(found, found.xhat),
        layout=_layout("x̂, in σ of the day", range=[-3.6, 3.6]),
        alt=say("normalize-alt", found),
        caption="The same dots and the same runner as in the first picture.",
    )


def output_picture(found: Season) -> Figure:
    """γ·x̂ + β: another scale, the same picture."""
    return Figure(
        id="scale",
        title="Scaled and shifted",
        data=_two_kinds_of_days(found, found.y),
        layout=_layout("y", range=[62, 118]),
        alt=say("scale-alt", found),
        caption=say("scale-caption", found),
    )


def trend_picture(found: Season) -> Figure:
    """Two runners before, after and in truth."""
    titles = ("raw time, s", "after batch norm", "true form, s")
    data: list[Trace] = []
    layout: dict[str, Any] = {"grid": {"rows": 1, "columns": 3, "pattern": "independent", "xgap": 0.28}}
    faster, slower = extremes(found)
    pair = ((faster, "gets faster", "with", "solid"), (slower, "gets slower", "without", "dash"))
    for panel, (title, values) in enumerate(
        zip(titles, (found.x, found.y, found.form), strict=True), start=1
    ):
        suffix = str(panel) if panel > 1 else ""
        layout |= {f"xaxis{suffix}": {"title": {"text": "day"}}, f"yaxis{suffix}": {"title": {"text": title}}}
        for runner, name, colour, dash in pair:
            days, places = found.runs_of(runner)
            label = name if panel == 1 else f"{name}, {title}"
            line = _line(label, (days + 1).tolist(), values[days, places].tolist(), colour, dash=dash)
            line |= {"mode": "lines+markers", "marker": _marker(colour, dash), "legendgroup": name}
            line |= {"showlegend": panel == 1}
            data.append(line | {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"})
    return Figure(
        id="trend",
        title="Two runners: raw, after batch norm, and the truth",
        data=data,
        layout=layout,
        alt=say("trend-alt", found),
        caption=say("trend-caption", found),
        height=340,
    )


def _two_kinds_of_days(found: Season, values: Tensor) -> list[Trace]:
    faster, _ = extremes(found)
    days, places = found.runs_of(faster)
    cool, hot = (
        _dots(name, *_runs(found, values, kind), colour, symbol)
        for name, kind, colour, symbol in (
            ("cool day", 0, "with", "circle"),
            ("hot day", 1, "without", "diamond"),
        )
    )
    own = _line("one runner", (days + 1).tolist(), values[days, places].tolist(), "ink", width=1.5)
    return [cool, hot, own]


def _runs(found: Season, values: Tensor, kind: int | None = None) -> tuple[list[int], list[float]]:
    """Day numbers and values of all runs, or of those on days of one kind."""
    wanted = (found.hot == found.hot) if kind is None else found.hot == kind
    chosen = values[wanted]
    days = (wanted.nonzero() + 1).expand(-1, values.shape[1])
    return days.flatten().tolist(), chosen.flatten().tolist()


def _days() -> list[int]:
    return list(range(1, DAYS + 1))


def _marker(colour: str, dash: str) -> dict[str, Any]:
    return {"color": colour, "size": 5, "symbol": "circle" if dash == "solid" else "diamond"}


def _dots(name: str, x: Sequence[int], y: Sequence[float], colour: str, symbol: str = "circle") -> Trace:
    # Half hidden behind each other: 16 runs stand above one day.
    marker = {"color": colour, "size": 5, "symbol": symbol, "opacity": 0.55}
    return {"type": "scatter", "mode": "markers", "name": name, "x": x, "y": y, "marker": marker}


def _line(
    name: str,
    x: Sequence[int],
    y: Sequence[float],
    colour: str,
    *,
    width: float = 2,
    dash: str = "solid",
    **more: Any,
) -> Trace:
    line = {"color": colour, "width": width, "dash": dash}
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": line, **more}


def _layout(
    label: str, *, range: Sequence[float] | None = None, include: Sequence[float] | None = None
) -> dict[str, Any]:
    axis: dict[str, Any] = {"title": {"text": label}, "zeroline": False}
    if range is not None:
        axis["range"] = list(range)
    if include is not None:
        axis["autorangeoptions"] = {"include": list(include)}
    return {"xaxis": {"title": {"text": "day"}, "range": [0, DAYS + 1]}, "yaxis": axis}
