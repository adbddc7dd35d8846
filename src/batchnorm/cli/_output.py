"""Where output goes and how a command ends.

Results go to stdout; progress, hints and errors to stderr. With `--json -` the JSON is all that
stdout gets.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from batchnorm._errors import BatchNormError, OutputError, message
from batchnorm._files import check_writable, write_whole

if TYPE_CHECKING:
    from rich.console import Console

    from batchnorm.report.document import Document

__all__ = [
    "BAD_INPUT",
    "STDOUT",
    "JsonTarget",
    "attempt_all",
    "check_json_target",
    "check_page_target",
    "console_beside",
    "ending",
    "guarded",
    "interrupted",
    "present",
    "same_file",
    "stderr",
    "stdout",
    "users_code",
    "write_json",
]

BAD_INPUT = 2
INTERRUPTED = 130
TERMINATED = 143
STDOUT = "-"

JsonTarget = Annotated[
    str | None,
    typer.Option(
        "--json", metavar="FILE", help="Write JSON to FILE ('-': to stdout, and nothing else there)."
    ),
]
"""The option --json of a command that has other results as well."""


class _Ending:
    """What asked the process to end."""

    terminated = False


ending = _Ending()


def interrupted() -> typer.Exit:
    """Return the end of a command that was stopped: 130 after Ctrl-C, 143 after SIGTERM."""
    return typer.Exit(TERMINATED if ending.terminated else INTERRUPTED)


def stdout() -> "Console":
    """Return the console of results."""
    return _console(stderr=False)


def stderr() -> "Console":
    """Return the console of progress, hints and errors."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> "Console":
    from rich.console import Console

    class Patient(Console):
        """Falls silent when no one reads it any more; rich would end the process, and with it hours of work."""

        def on_broken_pipe(self) -> None:
            self.quiet = True
            # What is left in the buffer must not fail again when Python closes the stream.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    # highlight: rich would colour every number and path; only what is styled on purpose stands out.
    return Patient(stderr=stderr, highlight=False)


@contextmanager
def guarded(context: typer.Context, nothing_done: str = "interrupted") -> Iterator[None]:
    """Run a command's body; end it with one red line for each error, and an exit code, where it raises.

    Args:
        context: with the global option `--debug`, which shows the traceback as well.
        nothing_done: what Ctrl-C is answered with.
    """
    try:
        yield
    except KeyboardInterrupt:
        stderr().print(nothing_done, markup=False, soft_wrap=True)
        raise interrupted() from None
    except typer.Exit:
        raise
    except (Exception, SystemExit) as error:  # a module of the user's may call sys.exit()
        if (context.obj or {}).get("debug"):
            stderr().print(traceback.format_exc(), markup=False, soft_wrap=True, end="")
        for part in error.exceptions if isinstance(error, ExceptionGroup) else (error,):
            _print_error(_describe(part))
        raise typer.Exit(BAD_INPUT) from None


def _describe(error: BaseException) -> str:
    if isinstance(error, BatchNormError):
        return str(error)
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text} (batchnorm --debug ... shows where)"


@contextmanager
def users_code() -> Iterator[None]:
    """Send what the user's own code prints to stderr: stdout is for results."""
    with redirect_stdout(sys.stderr):
        yield


def attempt_all(*steps: Callable[[], object]) -> None:
    """Take every step, whatever becomes of the others.

    Raises:
        ExceptionGroup: with the errors of the steps that failed.
    """
    errors: list[Exception] = []
    for step in steps:
        try:
            step()
        except Exception as error:
            errors.append(error)
    if errors:
        raise ExceptionGroup("not everything could be done", errors)


def _print_error(text: str) -> None:
    from rich.text import Text

    # soft_wrap: one line stays one line, so that it can be searched for and copied.
    stderr().print(Text(f"error: {text}", style="bold red"), soft_wrap=True)


class Result(Protocol):
    """What a command can present."""

    def document(self) -> "Document":
        """The report."""

    def to_json(self) -> str:
        """All of it."""


def console_beside(json: str | None) -> "Console":
    """Return the console for what is said beside the JSON: not stdout if that is where the JSON goes."""
    return stderr() if json == STDOUT else stdout()


def present(
    result: Result,
    json: str | None,
    page: Callable[[], str | None],
    *more: Callable[[], str | None],
) -> None:
    """Write the files, print the report in brief, and say where the files lie; what fails does not stop the rest.

    Args:
        result: what was found.
        json: where its JSON goes.
        page: writes the page and says where it lies; None if none was asked for.
        more: the same for further files, after the JSON.

    Raises:
        ExceptionGroup: with the errors of what failed.
    """
    console = console_beside(json)
    written: list[str] = []

    def save(file: Callable[[], str | None]) -> None:
        line = file()
        if line is not None:
            written.append(line)

    def numbers() -> str | None:
        path = write_json(result.to_json(), json)
        return None if path is None else f"json: {path}"

    def print_report() -> None:
        from batchnorm.report import terminal

        if json != STDOUT:
            console.print(terminal.render(result.document(), brief=True))
            console.print()

    def print_places() -> None:
        for line in written:
            console.print(line, soft_wrap=True, markup=False)

    files = [partial(save, file) for file in (page, numbers, *more)]
    attempt_all(*files, print_report, print_places)


def check_page_target(page: Path, option: str, fix: str = "") -> None:
    """Raise before long work if the page could not be made or written after it."""
    if page.suffix.lower() not in (".html", ".htm"):
        raise OutputError(message(option, got=str(page), expected="a file that ends in .html", fix=fix))
    check_writable(page)
    from batchnorm.report import html

    html.check_available()


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file, through symbolic or hard links, too."""
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()


def check_json_target(target: str | None) -> None:
    """Raise before long work if the JSON could not be written after it."""
    if target is not None and target != STDOUT:
        check_writable(target)


def write_json(text: str, target: str | None) -> Path | None:
    """Write JSON to a file, or to stdout for "-"; return the file's path."""
    if target is None:
        return None
    if target == STDOUT:
        _write_stdout(text.rstrip("\n") + "\n")
        return None
    return write_whole(target, text.rstrip("\n") + "\n")


def _write_stdout(text: str) -> None:
    """Write UTF-8, which JSON is, whatever the encoding of stdout."""
    if sys.stdout is None:
        raise OutputError("cannot write to stdout: it is closed. Use --json FILE.")
    try:
        binary = getattr(sys.stdout, "buffer", None)
        if binary is None:  # replaced by something that takes text alone
            sys.stdout.write(text)
        else:
            sys.stdout.flush()
            binary.write(text.encode("utf-8"))
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(f"cannot write to stdout: {error.strerror or error}. Use --json FILE.") from error
