"""The application: global options, and the commands, one file each."""

from typing import Annotated

import typer

import batchnorm
from batchnorm.cli import bench, check, compare, env, explain, fold, recalibrate, rules

__all__ = ["app"]

app = typer.Typer(
    name="batchnorm",
    help="Batch normalization for PyTorch: see what it does to a network.",
    epilog="Exit codes: 0 fine, 1 findings, 2 usage or bad input, 130 interrupted, 143 terminated.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Help in boxes costs as much again as all the rest of `--help`: 0.14 s of imports.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"batchnorm {batchnorm.__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Batch normalization for PyTorch: see what it does to a network."""
    context.obj = {"debug": debug}


app.command("bench", short_help="Time the layers against PyTorch's, and check both.")(bench.command)
app.command("check", short_help="Look for what is wrong with a model's batch norms.")(check.command)
app.command("compare", short_help="Train with and without batch norm, and compare.")(compare.command)
app.command("env", short_help="Show versions, devices and backends.")(env.command)
app.command("explain", short_help="Explain batch norm step by step, or a rule of check.")(explain.command)
app.command("recalibrate", short_help="Renew the running statistics of a model from data.")(
    recalibrate.command
)
app.command("fold", short_help="Fold batch norm into the layers beside it, in a model file.")(fold.command)
app.command("rules", short_help="List the rules of check.")(rules.command)
