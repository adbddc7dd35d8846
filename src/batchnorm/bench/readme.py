"""The table that a Markdown file shows: written anew between two markers, the rest left as it is."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from batchnorm._errors import DataError, message
from batchnorm._files import write_whole
from batchnorm.bench.story import TRAINING, mean_columns, mean_rows
from batchnorm.bench.suites import SUITES
from batchnorm.bench.wording import RIVAL, network

if TYPE_CHECKING:
    from batchnorm.bench.result import Benchmark

__all__ = ["BEGIN", "END", "markdown", "refresh", "replaced"]

BEGIN = "<!-- benchmark: begin -->"
END = "<!-- benchmark: end -->"


def refresh(path: Path, result: "Benchmark") -> Path:
    """Put the result's table between the markers of a file, whole or not at all.

    Raises:
        DataError: the markers are not there once each, in order.
        OutputError: the file cannot be written.
    """
    return write_whole(path, replaced(path, markdown(result)))


def replaced(path: Path, table: str) -> str:
    """The file's text with a table between its markers.

    Raises:
        DataError: the markers are not there once each, in order, or the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(message("Markdown file", got=f"{path} ({error})", expected="a text file")) from error
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in head + tail:
        raise DataError(
            message(
                f"the markers of {path}",
                got=f"{text.count(BEGIN)} and {text.count(END)}",
                expected=f"one line {BEGIN} and after it one line {END}",
                fix="Put them where the table belongs.",
            )
        )
    return f"{head}{BEGIN}\n{table.strip()}\n{END}{tail}"


def markdown(result: "Benchmark") -> str:
    """The mean ratios of training steps and inference as Markdown, under what they were measured on."""
    machine, kinds = result.machine, list(dict.fromkeys((g.suite, g.layout, g.dtype) for g in result.groups))
    parts = [
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, batchnorm "
        f"{machine['batchnorm']}{' (' + machine['commit'] + ')' if machine['commit'] else ''}; memory is copied at "
        f"{result.copy / 1e9:.1f} GB/s. {_batches(result)}"
    ]
    parts += list(result.warnings)
    for rival in dict.fromkeys(group.rival for group in result.groups):
        rows = [
            [network(*kind), *row]
            for kind in kinds
            for row in mean_rows(result, kind, rival, (TRAINING, "inference"))
        ]
        names = [name.replace("\n", " ") for name in mean_columns(result.settings.memory)]
        parts.append(f"Against {RIVAL[rival]}:\n\n{_table(['network', *names], rows)}")
    return "\n\n".join(parts)


def _batches(result: "Benchmark") -> str:
    sizes = {SUITES[record.case.suite].title: record.case.shape[0] for record in result.records[::-1]}
    sizes.pop(SUITES["tiny"].title, None)
    return (
        "Batches: " + ", ".join(f"{size} for {title}" for title, size in sorted(sizes.items())) + "."
        if sizes
        else ""
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = ["---" if number < 3 else "---:" for number in range(len(columns))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, align, *rows))
