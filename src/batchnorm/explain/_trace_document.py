"""A trace as a document: each step with its formula, its numbers and its picture."""

from functools import partial
from typing import Any

from torch import Tensor

from batchnorm.explain._steps import NAMES, worked
from batchnorm.explain._trace import Trace, number, plural
from batchnorm.report.document import Block, Document, Figure, Formula, Paragraph, Section, Table

__all__ = ["formulas", "tell"]

_CHANNELS = 3  # what one picture can tell apart
_POINTS = 200
_ROWS = 12
_NORMALIZE = 3  # the step
_COLOURS = ("with", "without", "muted")
_SYMBOLS = ("circle", "diamond", "square")

WORDS = (
    "Add up the batch and divide: the one number that stands for all of it.",
    "How far the values lie from that mean, squared and averaged. Its root σ is the spread, in the values' own unit.",
    "Take the mean off, divide by the spread.",
    "Stretch by γ and move by β. A network learns both, so that it may undo the normalization where that is better.",
)


def tell(trace: Trace) -> Document:
    """The document: the numbers of all channels, then one section a step."""
    lines = formulas(trace, 0)
    pictures = (
        _picture(trace, trace.x, "mean", "the values and their mean", centre=trace.mean),
        _picture(
            trace,
            _squares(trace),
            "variance",
            "squared distances from the mean, and σ², their mean",
            trace.var,
        ),
        _picture(trace, trace.xhat, "normalize", "the normalized values"),
        _picture(trace, trace.y, "scale", "the output", centre=trace.bias),
    )
    sections = [Section("The batch", [_table(trace)])]
    for step, (name, words, line, picture) in enumerate(zip(NAMES, WORDS, lines, pictures, strict=True), 1):
        of = f" The numbers are those of {trace.names[0]}." if trace.channels > 1 and step == 1 else ""
        found = f" {_normalized(trace)}" if step == _NORMALIZE else ""
        blocks: list[Block] = [Paragraph(words + of + found), line, picture]
        sections.append(Section(f"Step {step}: {name[0].lower()}{name[1:]}", blocks))
    return Document("Batch norm in four steps", _verdict(trace), sections, facts=_facts(trace))


def formulas(
    trace: Trace, index: int, prefix: str = "", digits: int = 6
) -> tuple[Formula, Formula, Formula, Formula]:
    """The four formulas with the numbers of one channel."""
    x = trace.channel(trace.x, index)
    first = (trace.channel(trace.xhat, index)[0], trace.channel(trace.y, index)[0])
    results = (trace.mean[index].item(), trace.var[index].item(), *first)
    constants = (trace.eps, trace.weight[index].item(), trace.bias[index].item())
    return worked(x, results, constants, partial(number, digits=digits), prefix)


def _verdict(trace: Trace) -> str:
    mean, var = trace.mean[0].item(), trace.var[0].item()
    size = plural(trace.count, "value")
    what = size if trace.channels == 1 else f"{trace.channels} channels of {size} each; {trace.names[0]}"
    return (
        f"{what}: mean {number(mean)} and spread "
        f"{number(var**0.5)} before, mean 0 and spread {_spreads(trace)[0]} after normalization."
    )


def _spreads(trace: Trace) -> list[str]:
    """The spread of each channel of x̂: 1 where ε is small beside the variance, 0 where all values are equal."""
    squares = trace.xhat.square()
    means = squares if squares.dim() == 1 else squares.transpose(0, 1).flatten(1)
    spreads: list[float] = means.mean(-1).sqrt().flatten().tolist()
    return [number(spread, 3) for spread in spreads]


def _normalized(trace: Trace) -> str:
    """What step 3 leads to: spread 1, unless ε counts beside the variance, or there is none."""
    safe = "ε is a small number that keeps the division safe where all values are equal."
    spreads = _spreads(trace)
    others = [index for index, spread in enumerate(spreads) if spread != "1"]
    if not others:
        return f"Now the mean is 0 and the spread 1, whatever they were. {safe}"
    told = [_short_of_one(trace, index, spreads[index]) for index in others[:_CHANNELS]]
    more = len(others) - len(told)
    rest = [f"In {plural(more, 'more channel')} the spread is not 1 either."] if more else []
    if trace.channels == 1:
        first = "Now the mean is 0."
    elif len(others) == trace.channels:
        first = "Now every mean is 0, but no spread is 1."
    else:
        first = "Now every mean is 0 and the spread 1, with exceptions."
    return " ".join([first, *told, *rest])


def _short_of_one(trace: Trace, index: int, spread: str) -> str:
    """Why the spread of a channel is not 1 after normalization."""
    var, where = trace.var[index].item(), f"In {trace.names[index]} the" if trace.channels > 1 else "The"
    if var == 0:
        return (
            f"{where} values are all equal: each of them becomes 0, the spread stays 0, and it is ε that keeps the "
            "division safe."
        )
    return (
        f"{where} spread is {spread}, not 1, because ε = {trace.eps:g} counts beside a variance of "
        f"{number(var)}. The same values in a smaller unit have a larger variance."
    )


def _squares(trace: Trace) -> Tensor:
    """(x − μ)²: what step 2 averages."""
    mean = trace.mean if trace.x.dim() == 1 else trace.mean.reshape(1, -1, *[1] * (trace.x.dim() - 2))
    return (trace.x - mean).square()


def _picture(trace: Trace, values: Tensor, id: str, title: str, centre: Tensor | None = None) -> Figure:
    """Values against their place in the batch, a line for each centre."""
    data: list[dict[str, Any]] = []
    shown = range(min(trace.channels, _CHANNELS))
    for index in shown:
        column = trace.channel(values, index)
        stride = -(-len(column) // _POINTS)
        places = list(range(1, len(column) + 1, stride))
        colour = _COLOURS[index]
        if centre is not None:
            data.append(_line(centre[index].item(), len(column), colour))
        data.append(_dots(trace.names[index], places, column[::stride], colour, _SYMBOLS[index]))
    ends = trace.channel(values, 0)
    label = {"variance": "(x − μ)²", "normalize": "x̂", "scale": "y"}.get(id, "x")
    return Figure(
        id=id,
        title=title[0].upper() + title[1:],
        data=data,
        layout={
            "xaxis": {"title": {"text": "place in the batch"}} | ({"dtick": 1} if trace.count <= 20 else {}),
            "yaxis": {"title": {"text": label}, "zeroline": False},
            "showlegend": trace.channels > 1,
        },
        alt=f"{trace.names[0]}: from {number(min(ends))} to {number(max(ends))}"
        + (f", on average {number(trace.var[0].item())}." if id == "variance" else "."),
        caption=f"The first {_CHANNELS} of {trace.channels} channels." if trace.channels > _CHANNELS else "",
        height=300,
    )


def _dots(name: str, places: list[int], values: list[float], colour: str, symbol: str) -> dict[str, Any]:
    # A line of width 0: a browser shows points alone, a terminal draws what has lines as bars.
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": places,
        "y": values,
        "line": {"width": 0, "color": colour},
        "marker": {"color": colour, "size": 7, "symbol": symbol},
    }


def _line(level: float, last: int, colour: str) -> dict[str, Any]:
    line = {"color": colour, "width": 1.5, "dash": "dash"}
    return _quiet([1, last], [level, level], {"line": line})


def _quiet(x: list[int], y: list[float], more: dict[str, Any]) -> dict[str, Any]:
    quiet = {"hoverinfo": "skip", "showlegend": False}
    return {"type": "scatter", "mode": "lines", "x": x, "y": y, **quiet, **more}


def _table(trace: Trace) -> Table:
    columns = ("channel", "values", "mean μ", "variance σ²", "γ", "β", "y from", "y to")
    rows = []
    for index in range(min(trace.channels, _ROWS)):
        y = trace.channel(trace.y, index)
        numbers = (
            trace.mean[index],
            trace.var[index],
            trace.weight[index],
            trace.bias[index],
            min(y),
            max(y),
        )
        rows.append((trace.names[index], str(trace.count), *(number(float(value)) for value in numbers)))
    rest = trace.channels - len(rows)
    caption = "Every channel" + (f" (the first {_ROWS}; {rest} more are in the JSON)" if rest else "")
    return Table(columns, rows, caption, numeric=range(1, len(columns)))


def _facts(trace: Trace) -> dict[str, str]:
    return {"shape": "×".join(map(str, trace.x.shape)), "ε": f"{trace.eps:g}", "arithmetic": "float64"}
