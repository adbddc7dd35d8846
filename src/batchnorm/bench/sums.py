"""The table of sums: what the batch norms of a network take together, in milliseconds."""

from itertools import groupby
from typing import TYPE_CHECKING

from batchnorm.bench.record import OURS
from batchnorm.bench.suites import SUITES
from batchnorm.bench.summary import ANY, Total
from batchnorm.bench.wording import FOLLOWED, MALLOC, NAME, OPERATION, network
from batchnorm.report.document import Paragraph, Section, Table

if TYPE_CHECKING:
    from batchnorm.bench.result import Benchmark

__all__ = ["sums"]

NOTE = (
    "Medians of single calls, each as often as the network has a batch norm of that shape, added up. Copy: the time "
    "that the counted bytes take at the speed of a copy. A dash: one of the shapes could not be timed; the cautions "
    "say why."
)


def sums(result: "Benchmark") -> list[Section]:
    """A table for each suite, layout and type."""
    tables = [
        _table(result, list(each))
        for _, each in groupby(result.totals, lambda total: (total.suite, total.layout, total.dtype))
    ]
    return [Section("Sums", [*tables, Paragraph(NOTE, small=True)])] if tables else []


def _table(result: "Benchmark", totals: list[Total]) -> Table:
    first = totals[0]
    who = (OURS, *result.settings.against)
    states, epilogues = len(result.settings.memory) > 1, first.epilogue != ANY
    columns = ["operation", *(["then"] if epilogues else []), *(["memory"] if states else []), "batch norms"]
    numeric = tuple(range(len(columns) - 1, len(columns) + len(who) + 1))
    rows = [
        [
            OPERATION[total.operation],
            *([FOLLOWED[total.epilogue]] if epilogues else []),
            *([MALLOC[total.memory]] if states else []),
            str(total.norms),
            *(_milliseconds(total.seconds[name]) for name in who),
            _milliseconds(total.counted / result.copy),
        ]
        for total in totals
    ]
    return Table(
        columns=[*columns, *(f"{NAME[name]}\nms" for name in who), "copy\nms"],
        rows=rows,
        caption=f"{network(first.suite, first.layout, first.dtype)}: sums over the network's "
        f"{SUITES[first.suite].count} batch norms",
        numeric=numeric,
    )


def _milliseconds(value: float | None) -> str:
    """As "12.3"; more digits for less."""
    if value is None:
        return "–"
    number = 1e3 * value
    return f"{number:,.1f}" if number >= 10 else f"{number:.2f}" if number >= 1 else f"{number:.4f}"
