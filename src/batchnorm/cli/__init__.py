"""The command line: `batchnorm --help`.

Exit codes: 0 fine, 1 findings, 2 usage or bad input, 130 interrupted.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

__all__ = ["main"]

_NEEDED = ("typer", "rich")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line with `arguments` (default: the process's own) and exit."""
    missing = [package for package in _NEEDED if find_spec(package) is None]
    if missing:
        names = " and ".join(missing)
        print(
            f"error: the command line needs {names}, not installed. Run: pip install 'batchnorm[cli]'",
            file=sys.stderr,
        )
        raise SystemExit(2)

    from batchnorm.cli.app import app

    app(args=None if arguments is None else list(arguments), prog_name="batchnorm")
