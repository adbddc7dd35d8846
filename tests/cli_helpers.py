"""What the tests of the command line share."""

from typer.testing import Result


def only_error(result: Result) -> str:
    """The one line that a user sees when something is wrong."""
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    return result.stderr
