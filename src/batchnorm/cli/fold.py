"""`batchnorm fold`: a model file, or a model and its weights, with batch norm folded into the layers beside it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchnorm._errors import InputError, OutputError, message
from batchnorm._files import check_writable
from batchnorm.cli._output import (
    STDOUT,
    attempt_all,
    check_json_target,
    guarded,
    same_file,
    stderr,
    stdout,
    users_code,
    write_json,
)

if TYPE_CHECKING:
    from batchnorm._walk import Changes
    from batchnorm.report.document import Document

__all__ = ["command"]

_KINDS = {".onnx": (".onnx",), ".pt2": (".pt2",), "": (".safetensors", ".pt", ".pth")}


def command(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="IN", help="A .onnx or a .pt2 file, or MODULE:FACTORY.")],
    output: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="OUT",
            help="Where the folded model goes: .onnx, .pt2; of a MODULE:FACTORY its weights: .safetensors, .pt, .pth.",
        ),
    ],
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The weights of MODULE:FACTORY: .safetensors, or a state dict saved by torch.save.  "
            "[default: what it comes with]",
        ),
    ] = None,
    example: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHAPE",
            help="Run both models on random numbers of this shape, such as 1x3x224x224, and tell the error. "
            "Once for each input.",
        ),
    ] = None,
    json: Annotated[
        str | None,
        typer.Option(
            "--json", metavar="FILE", help="Write JSON to FILE ('-': to stdout, and nothing else there)."
        ),
    ] = None,
) -> None:
    """Fold batch norm into the convolution or linear layer beside it, for inference.

    The folded weights are computed in float64. IN is never changed. The
    folded weights of MODULE:FACTORY belong to batchnorm.fold(FACTORY().eval()).model.
    """
    with guarded(context, "interrupted: nothing was written"):
        shapes = [_shape(text) for text in example or ()]
        suffix = Path(source).suffix.lower() if ":" not in source or Path(source).is_file() else ""
        if suffix not in _KINDS:
            suffix = ""
        _check_source(source, suffix)
        _check_targets(source, suffix, output, weights, json)
        changes = _fold(source, suffix, weights, shapes)
        _present(changes, source, output, json)


def _shape(text: str) -> tuple[int, ...]:
    parts = text.lower().split("x")
    if not all(part.isdecimal() for part in parts):
        raise InputError(
            message(
                "--example",
                got=repr(text),
                expected="numbers with an x between them",
                fix="For example 1x3x224x224.",
            )
        )
    return tuple(int(part) for part in parts)


def _check_source(source: str, suffix: str) -> None:
    from batchnorm.cli._factory import is_spec

    if suffix or is_spec(source):
        return
    holds_weights = Path(source).suffix.lower() in (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
    raise InputError(
        message(
            "IN",
            got=repr(source),
            expected="a .onnx or a .pt2 file, or MODULE:FACTORY",
            fix=f"Weights go with the function that makes their model: my_nets:make_net --weights {source}."
            if holds_weights
            else "",
        )
    )


def _check_targets(source: str, suffix: str, output: Path, weights: Path | None, json: str | None) -> None:
    """Find out before the work that a result could not be written, or would stand over what is read."""
    if output.suffix.lower() not in _KINDS[suffix]:
        kinds = " or ".join(_KINDS[suffix])
        raise OutputError(message("-o", got=str(output), expected=f"a file that ends in {kinds}"))
    if suffix and weights is not None:
        raise InputError(
            message("--weights", got=str(weights), expected="nothing", fix=f"{source} holds its own weights.")
        )
    if not suffix:
        from batchnorm.cli._weights import check_format

        check_format(output)
    read = [Path(source)] if suffix else []
    if suffix == ".onnx" and Path(source).is_file():
        from batchnorm.surgery._model_files import external_files

        read += external_files(source)
    read += [weights] if weights is not None else []
    check_writable(output)
    check_json_target(json)
    written = [output, output.with_name(f"{output.name}.data")] if suffix == ".onnx" else [output]
    targets = [("-o", each) for each in written]
    if json not in (None, STDOUT):
        targets.append(("--json", Path(str(json))))
        if any(same_file(Path(str(json)), each) for each in written):
            raise InputError(message("-o and --json", got="the same file", expected="a file for each"))
    for option, target in targets:
        for file in read:
            if same_file(file, target):
                raise OutputError(
                    message(option, got=f"{target}, which is read", expected="another file than the input")
                )


def _fold(source: str, suffix: str, weights: Path | None, shapes: list[tuple[int, ...]]) -> "Changes":
    import batchnorm
    from batchnorm.surgery import _model_files as files

    if suffix:
        model: Any = files.load_model(source)
    else:
        from batchnorm.cli._factory import load_model
        from batchnorm.cli._weights import load_weights

        with users_code():
            model = load_model(source, "IN")().eval()
        if weights is not None:
            load_weights(model, weights)
    with users_code():
        return batchnorm.fold(model, files.random_inputs(model, shapes) if shapes else None)


def _present(changes: "Changes", source: str, output: Path, json: str | None) -> None:
    """Write the files, print the table, and say where the files lie. What fails does not keep the rest from it."""
    from torch import nn

    from batchnorm.cli._weights import save_weights
    from batchnorm.surgery._model_files import save

    console = stderr() if json == STDOUT else stdout()
    written: list[str] = []

    def save_model() -> None:
        if isinstance(changes.model, nn.Module):
            save_weights(changes.model, output)
            written.append(f"folded: {output}")
        else:
            written.extend(f"folded: {path}" for path in save(changes.model, output))

    def save_json() -> None:
        path = write_json(changes.to_json(), json)
        if path is not None:
            written.append(f"json: {path}")

    def print_tables() -> None:
        from batchnorm.report import terminal

        if json != STDOUT:
            console.print(terminal.render(document(changes, source)))
            console.print()

    def print_places() -> None:
        for line in written:
            console.print(line, soft_wrap=True, markup=False)

    attempt_all(save_model, save_json, print_tables, print_places)


def document(changes: "Changes", source: str) -> "Document":
    """Return what was folded and what was not as a document."""
    from batchnorm.report.document import Document, Paragraph, Section, Table

    total = len(changes.changed) + len(changes.skipped)
    verdict = f"{len(changes.changed)} of {total} batch norms folded." if total else "No batch norm found."
    sections = []
    if changes.changed:
        rows = [(each.name, each.before, each.note) for each in changes.changed]
        sections.append(Section("Folded", [Table(("batch norm", "was", "what became of it"), rows)]))
    if changes.skipped:
        left = [(each.name, each.reason) for each in changes.skipped]
        sections.append(Section("Left alone", [Table(("batch norm", "why"), left)]))
    notes = changes.notes if total else changes.notes[1:]  # the first is the verdict then
    if notes:
        sections.append(Section("Notes", [Paragraph(note) for note in notes]))
    return Document(title=f"batchnorm fold {source}", verdict=verdict, sections=sections)
