"""The figures of the report, as plain Plotly specifications with named colours."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from batchnorm.bench.record import OURS, Record
from batchnorm.bench.wording import FOLLOWED, RIVAL, percent
from batchnorm.report.document import Figure

if TYPE_CHECKING:
    from batchnorm.bench.result import Benchmark

__all__ = ["ratios", "shares"]

TRAINING = "forward+backward"

# Layouts by symbol, states of the memory by colour: both are read without the other.
_SYMBOLS = {"contiguous": "circle", "channels-last": "diamond", "rows": "square"}
_COLOURS = {"as-is": "without", "raised": "with"}


def ratios(result: "Benchmark") -> list[Figure]:
    """Every shape's ratio in a training step against the tensor's size."""
    rivals = list(dict.fromkeys(group.rival for group in result.groups))
    return [figure for rival in rivals if (figure := _ratios(result, rival)) is not None]


def _ratios(result: "Benchmark", rival: str) -> Figure | None:
    data: list[dict[str, Any]] = []
    every: list[float] = []
    shown = _shown(result)
    for (layout, memory), records in _split(shown, rival).items():
        values = [record.ratio(TRAINING, rival) or 0.0 for record in records]
        every += values
        data.append(
            {
                **_points(records, values),
                "name": _name(result, layout, memory),
                "marker": {"color": _COLOURS[memory], "symbol": _SYMBOLS[layout], "size": 9, "opacity": 0.8},
                "hovertemplate": "%{customdata}<br>%{x:.3~s}B: %{y:.2f}×",
            }
        )
    if not every:
        return None
    sizes = [record.case.bytes for record in shown]
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "x": [min(sizes), max(sizes)],
            "y": [1, 1],
            "name": "as fast",
            "line": {"color": "muted", "dash": "dot", "width": 1},
            "hoverinfo": "skip",
            "showlegend": False,
        }
    )
    faster = sum(value > 1 for value in every)
    return Figure(
        id=f"ratios-{rival}",
        title=f"How many times as fast as {RIVAL[rival]}, by the size of the tensor",
        data=data,
        layout=_layout(sizes, "ratio of the times", {"rangemode": "tozero"}),
        alt=(
            f"Forward + backward: faster than {RIVAL[rival]} in {faster} of {len(every)} cases; ratios from "
            f"{min(every):.2f} to {max(every):.2f}."
        ),
        caption="Forward + backward; one point a case. Above the dotted line ours is faster.",
        height=400,
    )


def shares(result: "Benchmark") -> list[Figure]:
    """Counted bytes a second as a share of the copy's speed, ours and the first rival's, in the last memory state."""
    memory = result.settings.memory[-1]
    rival = next((group.rival for group in result.groups), None)
    records = [record for record in _shown(result) if record.case.memory == memory and record.times]
    if rival is None or not records:
        return []
    data = []
    for contender, colour, symbol in ((OURS, "with", "circle"), (rival, "without", "diamond-open")):
        known = [record for record in records if record.speed(TRAINING, contender) is not None]
        data.append(
            {
                **_points(
                    known, [(record.speed(TRAINING, contender) or 0.0) / result.copy for record in known]
                ),
                "name": RIVAL.get(contender, contender),
                "marker": {"color": colour, "symbol": symbol, "size": 9},
                "hovertemplate": "%{customdata}<br>%{x:.3~s}B: %{y:.0%}",
            }
        )
    most = max(value for value in data[0]["y"])
    return [
        Figure(
            id="shares",
            title="Share of the speed at which this machine copies memory",
            data=data,
            layout=_layout(
                [record.case.bytes for record in records],
                "share",
                {"tickformat": ".0%", "rangemode": "tozero"},
            ),
            alt=f"Forward + backward by counted bytes: ours reaches {percent(most)} of a copy's speed at most.",
            caption=(
                "Forward + backward by counted bytes"
                + (", with malloc's thresholds raised" if memory == "raised" else "")
                + f". A copy moves {result.copy / 1e9:.1f} GB/s; what stays in a cache is faster than that."
            ),
            height=400,
        )
    ]


def _shown(result: "Benchmark") -> list[Record]:
    """The networks' shapes; the tiny ones, a thousandth of their size, only where there are no others."""
    tiny = [record for record in result.records if record.case.suite == "tiny"]
    return [record for record in result.records if record not in tiny] or tiny


def _split(records: Sequence[Record], rival: str) -> dict[tuple[str, str], list[Record]]:
    """The records with a ratio, by layout and state of the memory."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.ratio(TRAINING, rival) is not None:
            found.setdefault((record.case.layout, record.case.memory), []).append(record)
    return found


def _points(records: Sequence[Record], values: Sequence[float]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [record.case.bytes for record in records],
        "y": [round(value, 4) for value in values],
        "customdata": [
            f"{record.case.label}, {FOLLOWED[record.case.epilogue]}, {record.case.layout}"
            for record in records
        ],
    }


def _name(result: "Benchmark", layout: str, memory: str) -> str:
    return layout if len(result.settings.memory) == 1 else f"{layout}, {memory.replace('-', ' ')}"


def _layout(sizes: Sequence[int], y: str, yaxis: dict[str, Any]) -> dict[str, Any]:
    ticks = [step * 10**power for power in range(13) for step in (1, 2, 5)]
    ticks = [value for value in ticks if min(sizes) / 2.5 <= value <= 2.5 * max(sizes)]
    return {
        "xaxis": {
            "title": {"text": "size of one tensor"},
            "type": "log",
            "tickvals": ticks,
            "ticktext": [_size(value) for value in ticks],
        },
        "yaxis": {"title": {"text": y}, **yaxis},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hovermode": "closest",
    }


def _size(value: int) -> str:
    """20,000,000 as "20 MB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= size:
            return f"{value // size} {unit}"
    return f"{value} B"
