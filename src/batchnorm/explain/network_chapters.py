"""Two chapters on a trained network: the four steps on one of its batches, and what happens at inference."""

from functools import partial
from typing import Any

from batchnorm.explain._trace import number as exact
from batchnorm.explain._trace import plural
from batchnorm.explain._trace_document import formulas
from batchnorm.explain.network import BATCH, COMPANIES, RATE, STEPS, Inside
from batchnorm.report.document import Block, Figure, Formula, Paragraph

__all__ = ["four_steps_inside", "running_statistics"]

_DIGITS = 3
number = partial(exact, digits=_DIGITS)


def four_steps_inside(inside: Inside) -> list[Block]:
    """The four steps on the batch of one channel."""
    batch = inside.batch
    x, y = batch.channel(batch.x, 0), batch.channel(batch.y, 0)
    first, second, third, fourth = formulas(batch, 0, "inside-", _DIGITS)
    mean, spread = batch.mean.item(), batch.var.item() ** 0.5
    weight, bias = number(batch.weight.item()), number(batch.bias.item())
    return [
        Paragraph(
            "In a network the runners are samples, the day is the batch, and the time is what a neuron computes. The "
            f"network here has {inside.layers} hidden layers with a batch norm in each. When this text was made, it "
            f"was trained for {STEPS} steps on handwritten digits, and then got {inside.accuracy:.0%} of the digits "
            f"right that it had not seen. Below is one of the {inside.channels} neurons in hidden layer "
            f"{inside.place}, on one batch of {BATCH} digits."
        ),
        first,
        second,
        _values(
            "inside-before",
            "What arrives, with its mean and one σ on either side",
            x,
            mean,
            spread,
            "x",
            f"{BATCH} values about their mean of {number(mean)}, with a spread of {number(spread)}.",
        ),
        third,
        fourth,
        _values(
            "inside-after",
            "What leaves, after γ and β",
            y,
            batch.bias.item(),
            abs(batch.weight.item()),
            "y",
            f"The same values about β = {bias}, with the spread γ = {weight}.",
        ),
        Paragraph(
            f"γ = {weight} and β = {bias} were learnt; they started at 1 and 0. Every other neuron has its own mean, "
            f"variance, γ and β. This one is channel {inside.channel} of the module {inside.layer!r}, the one of its "
            f"layer whose mean lies farthest from 0; the learning rate was {RATE:g}.",
            small=True,
        ),
    ]


def running_statistics(inside: Inside) -> list[Block]:
    """The update rule with numbers, and one image in many companies."""
    m, mean = inside.momentum, inside.batch.mean.item()
    moved = (1 - m) * inside.running_mean + m * mean
    low, high = min(inside.companies), max(inside.companies)
    return [
        Paragraph(
            "A runner who trains alone has no day to be compared with, and one digit alone is no batch. So while it "
            "trains, the layer keeps a running mean and a running variance: each batch moves them a tenth of the way "
            "towards its own. At inference, in eval mode, they take the place of the batch's. If the batch above came "
            "next:"
        ),
        Formula(
            "running",
            "running mean ← (1 − momentum)·running mean + momentum·μ",
            # One digit more: the two means are close.
            f"(1 − {m:g})·{exact(inside.running_mean, 4)} + {m:g}·{exact(mean, 4)} = {exact(moved, 4)}",
        ),
        _companies(inside),
        Paragraph(
            f"The same digit in {COMPANIES} batches with different others: in train mode its output lies anywhere from "
            f"{number(low)} to {number(high)}, because each batch has its own mean and variance. In eval mode it is "
            f"{number(inside.alone)}, whoever else is there. Train and eval are two different functions, and many "
            "mistakes with batch norm come from that."
        ),
    ]


def _values(
    id: str, title: str, values: list[float], centre: float, spread: float, label: str, alt: str
) -> Figure:
    places, ends = list(range(1, len(values) + 1)), [1, len(values)]
    low, high = centre - spread, centre + spread
    quiet: dict[str, Any] = {"type": "scatter", "mode": "lines", "hoverinfo": "skip", "showlegend": False}
    band = {**quiet, "x": [*ends, *reversed(ends)], "y": [low, low, high, high], "fill": "toself"}
    middle = {"color": "with", "width": 1.5, "dash": "dash"}
    return Figure(
        id=id,
        title=title,
        data=[
            {**band, "fillcolor": "with-band", "line": {"width": 0}},
            {**quiet, "x": ends, "y": [centre, centre], "line": middle},
            _points("one digit each", places, values, "with", "circle"),
        ],
        layout=_layout(f"place in the batch of {plural(len(values), 'digit')}", label, len(values)),
        alt=alt,
        height=260,
    )


def _companies(inside: Inside) -> Figure:
    places = list(range(1, len(inside.companies) + 1))
    return Figure(
        id="companies",
        title="One and the same digit, in different company",
        data=[
            _points(
                "train mode: the batch's μ, σ²",
                places,
                list(inside.companies),
                "without",
                "diamond",
            ),
            {
                "type": "scatter",
                "mode": "lines",
                "name": "eval mode: the running ones",
                "x": [places[0], places[-1]],
                "y": [inside.alone, inside.alone],
                "line": {"color": "with", "width": 2.5},
            },
        ],
        layout=_layout("batch", "y of the digit", len(places)) | {"showlegend": True},
        alt="In train mode the output of one digit scatters from batch to batch; in eval mode it is one level line.",
        height=300,
    )


def _points(name: str, x: list[int], y: list[float], colour: str, symbol: str) -> dict[str, Any]:
    # A line of width 0: a browser shows points alone, a terminal draws what has lines as bars.
    marker = {"color": colour, "size": 7, "symbol": symbol}
    line = {"width": 0, "color": colour}
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": x,
        "y": y,
        "line": line,
        "marker": marker,
    }


def _layout(x: str, y: str, last: int) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": x}, "range": [0, last + 1]},
        "yaxis": {"title": {"text": y}, "zeroline": False},
        "showlegend": False,
    }
