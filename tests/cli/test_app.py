import subprocess
from collections.abc import Callable

import pytest
from typer.testing import Result

import batchnorm
from batchnorm import cli

HEAVY = ("torch", "numpy", "plotly", "jinja2", "sklearn")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["compare", "--help"], ["env", "-h"]])
def test_answers_that_need_no_torch_do_not_import_it(
    process: Callable[..., subprocess.CompletedProcess[str]], arguments: list[str]
) -> None:
    code = (
        "import sys\nfrom batchnorm.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as end:\n"
        f"    print([name for name in {HEAVY!r} if name in sys.modules], end.code)"
    )
    done = process("-c", code)
    assert done.stdout.splitlines()[-1] == "[] 0"
    assert done.stderr == ""


def test_the_version(run: Callable[..., Result]) -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"batchnorm {batchnorm.__version__}\n")


def test_help_lists_the_commands_and_the_exit_codes(run: Callable[..., Result]) -> None:
    text = run("--help").stdout
    assert all(part in text for part in ("compare", "env", "130 interrupted"))


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["--nonsense"], ["env", "surplus"], ["compare", "--lr", "x"]]
)
def test_wrong_usage_ends_with_two(run: Callable[..., Result], arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error" in result.stderr


def test_missing_packages_are_answered_with_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "error: the command line needs typer and rich, not installed. Run: pip install typer rich\n"
    )
