"""The figures of the report, as plain Plotly specifications with named colours."""

from collections.abc import Sequence
from typing import Any

from batchnorm.comparison.footing import Footing, Side
from batchnorm.comparison.summary import Arm, Summary
from batchnorm.comparison.training import Run
from batchnorm.comparison.wording import Words
from batchnorm.report.document import Figure

__all__ = [
    "COLOURS",
    "DASHES",
    "NAMES",
    "band",
    "batch_statistics",
    "layout",
    "learning_rates",
    "loss_curves",
    "score_curves",
]

Trace = dict[str, Any]

NAMES = {True: "with batch norm", False: "without"}
COLOURS = {True: "with", False: "without"}
DASHES = {True: "solid", False: "dash"}


def score_curves(summary: Summary, runs: Sequence[Run]) -> Figure:
    """Test accuracy or R² against steps, each network at its best rate: mean and range over seeds."""
    w = summary.words
    data: list[Trace] = []
    for arm, normalized in ((summary.normalized, True), (summary.plain, False)):
        chosen = _chosen(runs, summary, normalized, arm.best_lr)
        data += _over_seeds(
            chosen, [run.score for run in chosen], normalized, arm.best_lr, fill=summary.chance
        )
    goal = sum(summary.plain.best) / len(summary.plain.best)
    end = max(trace["x"][-1] for trace in data)
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "x": [0, end],
            "y": [goal, goal],
            "name": "best without",
            "line": {"color": "muted", "dash": "dot", "width": 1},
            "hoverinfo": "skip",
        }
    )
    final = [w.score(sum(arm.final) / len(arm.final)) for arm in (summary.normalized, summary.plain)]
    return Figure(
        id="score",
        title=f"Test {w.metric} against training steps",
        data=data,
        layout=layout("training steps", f"test {w.metric}", {"tickformat": w.axis}),
        alt=f"The test {w.metric} of both networks. With batch norm it ends at {final[0]}, without at {final[1]}.",
        caption="Each network at the learning rate where its test score peaks highest, "
        + (
            f"mean of {len(summary.seeds)} seeds; the band reaches from the lowest to the highest seed. "
            if len(summary.seeds) > 1
            else "one seed. "
        )
        + _fastest(summary),
        height=420,
    )


def _fastest(summary: Summary) -> str:
    """Which rates the step counts belong to; a curve above need not show them."""
    target = summary.judged
    return (
        f"'How much sooner?' counts steps at the learning rate that gets to the goal soonest: {target.normalized_lr:g} "
        f"with batch norm, {target.plain_lr:g} without."
    )


def loss_curves(summary: Summary, runs: Sequence[Run]) -> Figure:
    """Training loss against steps, each network at its best rate."""
    data: list[Trace] = []
    for arm, normalized in ((summary.normalized, True), (summary.plain, False)):
        chosen = _chosen(runs, summary, normalized, arm.best_lr)
        data += _over_seeds(chosen, [run.loss for run in chosen], normalized, arm.best_lr, fill=None)
    return Figure(
        id="loss",
        title="Training loss against training steps",
        data=data,
        layout=layout(
            "training steps", f"training loss ({summary.words.loss.removeprefix('in ')})", {"type": "log"}
        ),
        alt="Training losses of both networks on a logarithmic axis, each at its best learning rate.",
        caption="Mean over the batches since the point before.",
    )


def learning_rates(summary: Summary) -> Figure:
    """Final score against learning rate, with and without."""
    w = summary.words
    data: list[Trace] = []
    for arm, normalized in ((summary.normalized, True), (summary.plain, False)):
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": [rate.lr for rate in arm.rates],
                "y": [rate.final.mean for rate in arm.rates],
                "name": NAMES[normalized],
                "line": {"color": COLOURS[normalized], "dash": DASHES[normalized]},
                "marker": {
                    "color": COLOURS[normalized],
                    "symbol": "circle" if normalized else "diamond",
                    "size": 8,
                },
                "customdata": [rate.diverged for rate in arm.rates],
                "hovertemplate": f"rate %{{x}}: %{{y:{w.axis.replace('.0', '.1')}}}, diverged: %{{customdata}}",
            }
        )
    return Figure(
        id="rates",
        title=f"Final test {w.metric} against learning rate",
        data=data,
        layout=layout("learning rate", f"final test {w.metric}", {"tickformat": w.axis}, _rate_axis(summary)),
        alt=f"With batch norm: {_listed(summary.normalized, w)}. Without: {_listed(summary.plain, w)}.",
        caption=f"Mean over seeds. A diverged training counts as {w.guessing}.",
    )


def _rate_axis(summary: Summary) -> dict[str, Any]:
    """A logarithmic axis whose ticks are the rates that were run."""
    rates = [rate.lr for rate in summary.plain.rates]
    return {"type": "log", "tickvals": rates, "ticktext": [f"{lr:g}" for lr in rates]}


def batch_statistics(found: Footing) -> Figure:
    """Each batch's mean and spread at one layer, before and after normalization."""
    clouds = [
        _cloud(found.before, "with: before normalization", "muted", "circle-open"),
        _cloud(found.after, "with: after normalization", "with", "circle"),
    ]
    if found.without is not None:
        clouds.insert(0, _cloud(found.without, "without batch norm", "without", "diamond-open"))
    return Figure(
        id="batches",
        title="Every batch's mean and spread at one hidden layer",
        data=clouds,
        layout=layout("mean, less the average batch's (σ)", "spread, less the average batch's (σ)"),
        alt=(
            f"Before normalization the batches scatter around the average by {found.before.mean:.3f} σ in the mean and "
            f"{found.before.spread:.3f} σ in the spread, after it by {found.after.mean:.3f} σ and "
            f"{found.after.spread:.3f} σ."
        ),
        caption=(
            f"At {found.place} of the trained network (learning rate {found.lr:g}, seed {found.seed}); one point a "
            f"batch and channel, {found.batches} batches, {found.shown} of {found.channels} channels."
        ),
    )


def _chosen(runs: Sequence[Run], summary: Summary, normalized: bool, lr: float) -> list[Run]:
    return [
        run for run in runs if run.normalized == normalized and run.lr == lr and run.seed in summary.seeds
    ]


def _over_seeds(
    runs: list[Run], curves: Sequence[Sequence[float]], normalized: bool, lr: float, fill: float | None
) -> list[Trace]:
    """Mean line and lowest-to-highest band; after a divergence the curve goes on at `fill`, or stops."""
    steps = max((run.steps for run in runs), key=len)
    columns: list[list[float]] = []
    for at in range(len(steps)):
        values = [curve[at] if at < len(curve) else fill for curve in curves]
        columns.append([value for value in values if value is not None and value == value])
    kept = [(step, column) for step, column in zip(steps, columns, strict=True) if column]
    return band(
        [step for step, _ in kept],
        [min(column) for _, column in kept],
        [max(column) for _, column in kept],
        [sum(column) / len(column) for _, column in kept],
        normalized,
        f", rate {lr:g}",
        width=2.5,
    )


def _cloud(side: Side, name: str, colour: str, symbol: str) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [round(x, 5) for x, _ in side.points],
        "y": [round(y, 5) for _, y in side.points],
        "name": name,
        "marker": {"color": colour, "size": 5, "symbol": symbol},
    }


def band(
    x: list[int],
    low: list[float],
    high: list[float],
    middle: list[float],
    normalized: bool,
    suffix: str,
    width: float = 2,
) -> list[Trace]:
    """A line in the network's colour, and the band from `low` to `high` about it; `suffix` ends its name."""
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
        "line": {"color": colour, "dash": DASHES[normalized], "width": width},
    }
    return [
        {**edge, "y": low},
        {**edge, "y": high, "fill": "tonexty", "fillcolor": f"{colour}-band"},
        line,
    ]


def layout(
    x: str, y: str, yaxis: dict[str, Any] | None = None, xaxis: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Axes with titles, and the legend above."""
    return {
        "xaxis": {"title": {"text": x}, **(xaxis or {})},
        "yaxis": {"title": {"text": y}, **(yaxis or {})},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hovermode": "closest",
    }


def _listed(arm: Arm, w: Words) -> str:
    return ", ".join(f"{w.score(rate.final.mean)} at {rate.lr:g}" for rate in arm.rates)
