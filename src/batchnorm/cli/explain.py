"""`batchnorm explain`: what batch norm does, step by step, on made-up runners or the user's own numbers; or a rule."""

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchnorm._errors import InputError, message
from batchnorm._files import write_whole
from batchnorm.cli._output import (
    STDOUT,
    JsonTarget,
    check_json_target,
    check_page_target,
    console_beside,
    guarded,
    stderr,
    stdout,
    write_json,
)
from batchnorm.cli._rule_page import explain_rule
from batchnorm.cli._table import as_number, read_table

if TYPE_CHECKING:
    from batchnorm.explain import Trace
    from batchnorm.report.document import Section

__all__ = ["command"]

_LAST = 9


def command(
    context: typer.Context,
    code: Annotated[
        str | None,
        typer.Argument(
            metavar="[CODE]", help="A rule of `batchnorm check`, as BN101: what it means and what to do."
        ),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=_LAST,
            metavar="N",
            help="One step: 0 raw times, 1 mean, 2 variance, 3 normalize, 4 scale and shift, 5 who is improving, "
            "6 inside a network, 7 running statistics, 8 what is left out, 9 questions.",
        ),
    ] = None,
    pause: Annotated[
        bool, typer.Option("--pause/--no-pause", help="Wait for Enter between steps, in a terminal.")
    ] = True,
    values: Annotated[
        str | None, typer.Option(metavar="1,2,3...", help="Your own batch of numbers instead of the runners.")
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            "--csv",
            metavar="FILE",
            help="Your own table: a row a sample, a column a channel; a first line of names may be there.",
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A column of the table, by name or number; repeatable.  [default: all that hold numbers]",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one HTML page; the runners' has sliders.")
    ] = None,
    json: JsonTarget = None,
) -> None:
    """Explain batch norm: mean, variance, normalize, scale and shift.

    Made-up runners train on hot and cool days, and raw times hide who is
    improving. Or give numbers of your own with --values or --csv. With the
    code of a rule it prints that rule's page.
    """
    with guarded(context):
        if code is not None:
            _check_alone(
                {"--step": step, "--values": values, "--csv": table, "--column": column, "--html": html}
            )
            explain_rule(code, json)
            return
        _check(step, values, table, column, html, json)
        if values is not None or table is not None:
            _explain_trace(_own(values, table, column or []), step, pause, html, json)
        else:
            _explain_story(step, pause, html, json)


def _check_alone(others: dict[str, object]) -> None:
    """The page of a rule has no steps and no numbers."""
    for option, value in others.items():
        if value is not None:
            raise InputError(message(option, got="the code of a rule as well", expected="one of them"))


def _check(
    step: int | None,
    values: str | None,
    table: Path | None,
    column: list[str] | None,
    html: Path | None,
    json: str | None,
) -> None:
    """Refuse what does not fit together, before any work."""
    if values is not None and table is not None:
        raise InputError(message("--values and --csv", got="both", expected="one of them"))
    if column and table is None:
        raise InputError(message("--column", got=column[0], expected="--csv FILE with it"))
    if (values is not None or table is not None) and step is not None and not 1 <= step <= 4:
        raise InputError(message("--step", got=step, expected="1 to 4 for numbers of your own"))
    if step is not None and (html is not None or json is not None):
        raise InputError(
            message(
                "--step", got="it with --html or --json", expected="one of them", fix="Files hold all steps."
            )
        )
    if html is not None:
        check_page_target(html, "--html")
    check_json_target(json)
    if html is not None and json not in (None, STDOUT) and Path(str(json)).resolve() == html.resolve():
        raise InputError(message("--json", got=f"the same file as --html, {html}", expected="another file"))


def _explain_story(step: int | None, pause: bool, html: Path | None, json: str | None) -> None:
    from batchnorm.explain import chapters

    if html is not None or json is not None:
        from batchnorm.explain.page import page, story_json

        _write(page() if html is not None else "", html, story_json() if json is not None else "", json)
        return
    numbers = range(len(chapters.CHAPTERS)) if step is None else [step]
    if step is None:
        from rich.text import Text

        stdout().print(Text(chapters.TITLE, style="bold"), Text(chapters.lead()), sep="\n\n")
    _show((chapters.chapter(number) for number in numbers), pause)


def _explain_trace(
    trace: "Trace", step: int | None, pause: bool, html: Path | None, json: str | None
) -> None:
    if html is not None or json is not None:
        from batchnorm.report.html import render

        text = render(trace.document(), trace.to_dict()) if html is not None else ""
        _write(text, html, trace.to_json(), json)
        return
    sections = trace.document().sections  # the batch, then the four steps
    if step is None:
        stdout().print(trace.document().verdict, markup=False)
    _show(sections if step is None else [sections[step]], pause)


def _write(page: str, html: Path | None, numbers: str, json: str | None) -> None:
    """Write what was asked for, and say where it lies."""
    console = console_beside(json)
    if html is not None:
        write_whole(html, page)
        console.print(f"page: {html}", soft_wrap=True, markup=False)
    written = write_json(numbers, json) if json is not None else None
    if written is not None:
        console.print(f"json: {written}", soft_wrap=True, markup=False)


def _show(sections: Iterable["Section"], pause: bool) -> None:
    """Print the sections one after the other; wait between them where someone sits at a terminal."""
    from batchnorm.report import terminal

    console = stdout()
    waits = pause and console.is_terminal and _someone_sits_there()
    for number, section in enumerate(sections):
        if number and waits:
            console.print()
            try:
                console.input("[dim]Enter for the next step, Ctrl-C to end[/] ")
            except EOFError:
                waits = False
        console.print(terminal.render_section(section))


def _someone_sits_there() -> bool:
    return sys.stdin.isatty()


def _own(values: str | None, table: Path | None, columns: list[str]) -> "Trace":
    from batchnorm.explain import trace

    if table is None:
        return trace(_numbers(values or ""))
    read = read_table(table, columns)
    for note in read.notes:
        stderr().print(f"note: {table}: {note}", soft_wrap=True, markup=False)
    return replace(trace(read.rows), names=read.names)


def _numbers(text: str) -> list[float]:
    """Numbers between commas, semicolons or spaces."""
    parts = text.replace(",", " ").replace(";", " ").split()
    numbers = [as_number(part) for part in parts]
    for part, number in zip(parts, numbers, strict=True):
        if number is None:
            raise InputError(
                message(
                    "--values",
                    got=repr(part),
                    expected="finite numbers between commas",
                    fix="As in 81,84,93.",
                )
            )
    if len(numbers) < 2:
        raise InputError(
            message("--values", got=repr(text), expected="at least two numbers", fix="As in 1,2,3.")
        )
    return [number for number in numbers if number is not None]
