"""A table of numbers from a CSV file: nothing that stands in it is left out without a word."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from batchnorm._errors import DataError, message

__all__ = ["Table", "as_number", "read_table"]

_SEPARATORS = {";": "semicolons", "\t": "tabs", ",": "commas"}
_ROWS = 2


@dataclass(frozen=True)
class Table:
    """Columns of numbers.

    Args:
        names: what the columns are called.
        rows: the numbers, row by row.
        notes: what the reader of the file should know of how it was taken.
    """

    names: tuple[str, ...]
    rows: list[list[float]]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Cells:
    """The text of a table: `lines` are the numbers of its rows' lines in the file, counted from 1."""

    path: Path
    names: list[str]
    lines: list[int]
    rows: list[list[str]]

    def numbers(self, place: int) -> list[bool]:
        """Of each cell in a column, whether it is a number."""
        return [as_number(row[place]) is not None for row in self.rows]

    def complete(self) -> list[int]:
        """The columns that hold numbers alone."""
        return [place for place in range(len(self.names)) if all(self.numbers(place))]


def as_number(text: str) -> float | None:
    """Return a finite number, or None where there is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def read_table(path: Path, wanted: Sequence[str]) -> Table:
    """Return columns of a CSV file: those that are wanted, and else all that hold numbers.

    A first line that holds numbers alone is data; then the columns are numbered from 1.

    Raises:
        DataError: no table, a column that is not there, or a cell that is no number.
    """
    cells, notes = _read(path)
    complete = cells.complete()
    if wanted:
        chosen = [_place(cells, name, complete) for name in wanted]
    else:
        for place in range(len(cells.names)):
            _check_gaps(cells, place, complete)
        chosen = complete
        left = [name for place, name in enumerate(cells.names) if place not in complete]
        if chosen and left:
            notes.append(f"left out, since they do not hold numbers: {', '.join(left)}")
    if not chosen:
        raise DataError(
            message(
                f"--csv {path}",
                got="no column that holds numbers alone",
                expected="one",
                fix="Write decimals with a point, and cells between commas, semicolons or tabs.",
            )
        )
    rows = [
        [_value(cells, line, row, place, complete) for place in chosen]
        for line, row in zip(cells.lines, cells.rows, strict=True)
    ]
    return Table(tuple(cells.names[place] for place in chosen), rows, tuple(notes))


def _read(path: Path) -> tuple[_Cells, list[str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        separator, found = _split(text)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8 with commas"
        raise DataError(
            message(f"--csv {path}", got=reason, expected="a CSV file that can be read")
        ) from error
    width = len(found[0][1]) if found else 0
    for line, row in found:
        if len(row) != width:
            raise DataError(
                message(
                    f"--csv {path}, line {line}",
                    got=f"{len(row)} cell{'' if len(row) == 1 else 's'}",
                    expected=f"{width}, as in the first line",
                    fix=f"The cells were taken to be separated by {_SEPARATORS[separator]}.",
                )
            )
    # A separator at the end of every line makes a column that nobody wrote.
    kept = [place for place in range(width) if any(row[place] for _, row in found)]
    lines, rows = [line for line, _ in found], [[row[place] for place in kept] for _, row in found]
    notes = []
    # A decimal comma is refused later, where it stands.
    if rows and all(as_number(cell.replace(",", ".")) is not None for cell in rows[0] if cell):
        names = [f"column {place}" for place in range(1, len(kept) + 1)]
        notes.append("no line of names: the first line holds numbers and is data; the columns are numbered")
    else:
        first, lines, rows = (rows[0] if rows else []), lines[1:], rows[1:]
        names = [cell or f"column {place}" for place, cell in enumerate(first, start=1)]
        numbers = [cell for cell in first if as_number(cell) is not None]
        if numbers:
            notes.append(f"the first line is taken for names, although it holds {', '.join(numbers)}")
    if len(rows) < _ROWS:
        raise DataError(
            message(
                f"--csv {path}",
                got=f"{len(rows)} row{'' if len(rows) == 1 else 's'} of data",
                expected="at least two rows, with or without a line of names above",
            )
        )
    return _Cells(path, names, lines, rows), notes


def _split(text: str) -> tuple[str, list[tuple[int, list[str]]]]:
    """The separator, and the cells of each line that is not blank, with its number.

    It is the first that cuts all lines into equally many cells, two at least: semicolons before commas, which may be
    those of decimals.
    """
    found = {separator: _cut(text, separator) for separator in _SEPARATORS}
    for separator, lines in found.items():
        widths = {len(row) for _, row in lines}
        if len(widths) == 1 and widths != {1}:
            return separator, lines
    first = next((line for line in text.splitlines() if line.strip()), "")
    separator = max((",", ";", "\t"), key=first.count)
    return separator, found[separator]


def _cut(text: str, separator: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(text.splitlines(keepends=True), delimiter=separator)
    rows = ((reader.line_num, [" ".join(cell.split()) for cell in row]) for row in reader)
    return [(line, row) for line, row in rows if any(row)]


def _place(cells: _Cells, name: str, complete: list[int]) -> int:
    """The place of a column, by its name or its number."""
    count = cells.names.count(name)
    if count == 1:
        return cells.names.index(name)
    if name.isdecimal() and 1 <= int(name) <= len(cells.names) and not count:
        return int(name) - 1
    numeric = ", ".join(cells.names[place] for place in complete)
    raise DataError(
        message(
            f"--csv {cells.path}, --column",
            got=f"{name!r}, the name of {count} columns" if count else repr(name),
            expected=f"one of {numeric}" if numeric else "a column of numbers, of which there is none",
            fix=f"A column's number, 1 to {len(cells.names)}, is taken too." if count else "",
        )
    )


def _check_gaps(cells: _Cells, place: int, complete: list[int]) -> None:
    """Refuse a column of numbers, as its cells mostly are, in which some cell is none."""
    numbers = cells.numbers(place)
    if place not in complete and 2 * sum(numbers) >= len(numbers):
        at = numbers.index(False)
        _value(cells, cells.lines[at], cells.rows[at], place, complete)


def _value(cells: _Cells, line: int, row: list[str], place: int, complete: list[int]) -> float:
    value = as_number(row[place])
    if value is not None:
        return value
    text = row[place]
    others = [cells.names[index] for index in complete]
    if "," in text and as_number(text.replace(",", ".")) is not None:
        fix = "Write decimals with a point."
    elif others and not any(cells.numbers(place)):
        fix = f"The columns of numbers: {', '.join(others)}."
    else:
        fix = "Fill it" if not text else "Mend it"
        fix += " or take the row out"
        fix += f", or name columns without such cells: --column {others[0]!r}." if others else "."
    raise DataError(
        message(
            f"--csv {cells.path}, line {line}, column {cells.names[place].removeprefix('column ')}",
            got=repr(text) if text else "an empty cell",
            expected="a finite number",
            fix=fix,
        )
    )
