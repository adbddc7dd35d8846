"""`batchnorm check`: what is wrong with the batch norm of a model, or of a checkpoint."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from batchnorm._errors import InputError, message
from batchnorm._files import check_writable, write_whole
from batchnorm.cli._check_inputs import Inputs
from batchnorm.cli._output import (
    STDOUT,
    JsonTarget,
    attempt_all,
    check_json_target,
    check_page_target,
    guarded,
    same_file,
    stderr,
    stdout,
    write_json,
)

if TYPE_CHECKING:
    from batchnorm.checks import Findings
    from batchnorm.checks.finding import Severity

__all__ = ["command"]

_FOUND = 1


class Format(StrEnum):
    """How findings are told."""

    TEXT = "text"
    JSON = "json"
    GITHUB = "github"
    HTML = "html"


class FailOn(StrEnum):
    """The least severity that ends the command with 1."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"
    NEVER = "never"


_SUFFIXES = {".html": Format.HTML, ".htm": Format.HTML, ".json": Format.JSON}


def command(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="MODULE:FACTORY, a function that returns a torch.nn.Module; or a checkpoint: .safetensors, or what "
            "torch.save wrote of a state dict.",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:LOADER",
            help="A function that returns a loader of batches, as they come in training: tensors, tuples whose first "
            "element is the input, or dicts of keyword arguments.",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Weights to load into the model first.  [default: what it comes with]",
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="A function of the model that returns the optimizer it is trained by, for weight decay.",
        ),
    ] = None,
    averaged: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Weights of an averaged copy of the model (EMA, SWA)."),
    ] = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="How many processes train the model.  [default: 1]")
    ] = None,
    batches: Annotated[int, typer.Option(min=1, metavar="N", help="How many batches are run at most.")] = 8,
    select: Annotated[
        list[str] | None,
        typer.Option(metavar="CODES", help="Rules to use: BN101,BN004, or BN1 for all that begin so."),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="CODES", help="Rules to leave out, in the same way.")
    ] = None,
    form: Annotated[
        Format | None,
        typer.Option(
            "--format", help="What to write. html needs --out.  [default: by the suffix of --out, else text]"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Write there; the terminal then shows the text."),
    ] = None,
    fail_on: Annotated[
        FailOn, typer.Option(help="The least severity that makes the exit code 1.")
    ] = FailOn.WARNING,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    json: JsonTarget = None,
) -> None:
    """Look for what is wrong with the batch norm in a model: in its numbers, its code, and on your data.

    Each finding says where, what was seen, why, and what to do. Nothing is
    changed. `batchnorm rules` lists the rules. Exit code 1: a warning or an
    error was found.
    """
    with guarded(context):
        form = _format(form, out)
        given = Inputs(
            model,
            batches,
            device,
            _codes(select),
            _codes(ignore),
            weights=weights,
            data=data,
            optimizer=optimizer,
            averaged=averaged,
            world_size=world_size,
        )
        _check_targets(form, out, json, given.files)
        findings = given.findings()
        _present(findings, form, out, json)
        if fail_on is not FailOn.NEVER and findings.at_least(cast("Severity", fail_on.value)):
            raise typer.Exit(_FOUND)


def _format(form: Format | None, out: Path | None) -> Format:
    if form is None:
        return Format.TEXT if out is None else _SUFFIXES.get(out.suffix.lower(), Format.TEXT)
    if form is Format.HTML and out is None:
        raise InputError(
            message("--format html", got="no --out", expected="a file", fix="Add --out check.html.")
        )
    return form


def _check_targets(form: Format, out: Path | None, json: str | None, read: list[Path]) -> None:
    """Find out before the work that a result could not be written, or would stand over what is read."""
    if form is Format.HTML and out is not None:
        check_page_target(out, "--out")
    elif out is not None:
        check_writable(out)
    check_json_target(json)
    beside = None if json in (None, STDOUT) else Path(str(json))
    if json == STDOUT and out is None and form not in (Format.TEXT, Format.JSON):
        raise InputError(message("--json -", got=f"--format {form} as well", expected="one result on stdout"))
    if out is not None and beside is not None and same_file(out, beside):
        raise InputError(message("--json", got=f"the same file as --out, {out}", expected="another file"))
    for option, target in (("--out", out), ("--json", beside)):
        if target is not None and any(same_file(file, target) for file in read):
            raise InputError(
                message(option, got=f"{target}, which is read", expected="another file than the input")
            )


def _codes(given: list[str] | None) -> list[str] | None:
    """One option may name several, with commas or spaces between them."""
    return None if given is None else [code for part in given for code in part.replace(",", " ").split()]


def _present(findings: "Findings", form: Format, out: Path | None, json: str | None) -> None:
    """Write the files and print the findings. What fails does not keep the rest from it."""
    from batchnorm.cli import _findings as told

    to_stdout = json == STDOUT or (out is None and form is not Format.TEXT)
    console = stderr() if to_stdout else stdout()
    written: list[str] = []

    def save() -> None:
        if out is None and form is Format.JSON:
            if json != STDOUT:
                write_json(findings.to_json(), STDOUT)
        elif out is None and form is Format.GITHUB:
            stdout().print(_plain(told.github(findings)), end="", soft_wrap=True)
        elif out is not None:
            _save(findings, form, out)
            written.append(f"{form}: {out}")

    def save_json() -> None:
        path = write_json(findings.to_json(), json)
        if path is not None:
            written.append(f"json: {path}")

    def print_findings() -> None:
        if not to_stdout:
            console.print(told.render(findings))
        elif form is Format.GITHUB:  # a log shows both; the annotations count nothing
            console.print(_plain(findings.summary), soft_wrap=True)

    def print_places() -> None:
        for line in written:
            console.print(_plain(line), soft_wrap=True)

    attempt_all(save, save_json, print_findings, print_places)


def _plain(text: str) -> Any:
    """Text in which rich looks for nothing: no markup, no names of emoji."""
    from rich.text import Text

    return Text(text)


def _save(findings: "Findings", form: Format, out: Path) -> None:
    from batchnorm.cli import _findings as told

    if form is Format.HTML:
        findings.save(out)
    elif form is Format.JSON:
        write_whole(out, findings.to_json() + "\n")
    elif form is Format.GITHUB:
        write_whole(out, told.github(findings))
    else:
        write_whole(out, told.text(findings))
