"""The command line: `batchnorm --help`.

Exit codes: 0 fine, 1 findings, 2 usage or bad input, 130 interrupted, 143 terminated.
"""

import codecs
import contextlib
import io
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from types import FrameType

__all__ = ["main"]

_NEEDED = ("typer", "rich")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line with `arguments` (default: the process's own) and exit."""
    missing = [package for package in _NEEDED if find_spec(package) is None]
    if missing:
        print(
            f"error: the command line needs {' and '.join(missing)}, not installed. "
            f"Run: pip install {' '.join(missing)}",
            file=sys.stderr,
        )
        raise SystemExit(2)
    for stream in (sys.stdout, sys.stderr):
        _print_anything(stream)
    try:
        from batchnorm.cli import _output
        from batchnorm.cli.app import app

        def terminate(number: int, frame: FrameType | None) -> None:
            _output.ending.terminated = True
            signal.raise_signal(signal.SIGINT)

        # ValueError: not in the main thread, which then is not ours to stop.
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, terminate)
        app(args=None if arguments is None else list(arguments), prog_name="batchnorm")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _print_anything(stream: object) -> None:
    """Let a stream of another encoding than UTF-8 replace what it cannot print, in place of failing at the end."""
    if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
        stream.reconfigure(errors="replace")
