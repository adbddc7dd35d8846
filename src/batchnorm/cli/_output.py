"""Where output goes and how a command ends.

Results go to stdout; progress, hints and errors to stderr. With `--json -` the JSON is all that
stdout gets.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from batchnorm._errors import BatchNormError
from batchnorm._files import check_writable, write_whole

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "BAD_INPUT",
    "INTERRUPTED",
    "STDOUT",
    "check_json_target",
    "guarded",
    "stderr",
    "stdout",
    "write_json",
]

BAD_INPUT = 2
INTERRUPTED = 130
STDOUT = "-"


def stdout() -> "Console":
    """Return the console of results."""
    return _console(stderr=False)


def stderr() -> "Console":
    """Return the console of progress, hints and errors."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> "Console":
    from rich.console import Console

    # highlight: rich would colour every number and path; only what is styled on purpose stands out.
    return Console(stderr=stderr, highlight=False)


@contextmanager
def guarded(context: typer.Context) -> Iterator[None]:
    """Run a command's body; end it with one red line and an exit code where it raises.

    With the global option `--debug` exceptions pass through, traceback and all.
    """
    debug = bool((context.obj or {}).get("debug"))
    try:
        yield
    except KeyboardInterrupt:
        stderr().print("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except (typer.Exit, BrokenPipeError):
        raise
    except BatchNormError as error:
        if debug:
            raise
        _print_error(str(error))
        raise typer.Exit(BAD_INPUT) from None
    except Exception as error:
        if debug:
            raise
        text = " ".join(str(error).split()) or "no message"
        _print_error(f"{type(error).__name__}: {text} (batchnorm --debug ... shows where)")
        raise typer.Exit(BAD_INPUT) from None


def _print_error(text: str) -> None:
    from rich.text import Text

    # soft_wrap: one line stays one line, so that it can be searched for and copied.
    stderr().print(Text(f"error: {text}", style="bold red"), soft_wrap=True)


def check_json_target(target: str | None) -> None:
    """Raise before long work if the JSON could not be written after it."""
    if target is not None and target != STDOUT:
        check_writable(target)


def write_json(text: str, target: str | None) -> Path | None:
    """Write JSON to a file, or to stdout for "-"; return the file's path."""
    if target is None:
        return None
    if target == STDOUT:
        sys.stdout.write(text.rstrip("\n") + "\n")
        return None
    return write_whole(target, text.rstrip("\n") + "\n")
