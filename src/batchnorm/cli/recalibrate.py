"""`batchnorm recalibrate`: renew the running statistics of a model's weights from data."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchnorm._errors import InputError, message
from batchnorm._files import check_writable
from batchnorm.cli._output import (
    STDOUT,
    attempt_all,
    check_json_target,
    guarded,
    stderr,
    stdout,
    users_code,
    write_json,
)

if TYPE_CHECKING:
    from torch import nn

    from batchnorm.stats import Recalibration

__all__ = ["command"]


class Mode(StrEnum):
    """How the layers in front normalize while a layer's statistics are taken."""

    JOINT = "joint"
    SEQUENTIAL = "sequential"


def command(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODULE:FACTORY", help="A function that returns a torch.nn.Module.")
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="MODULE:LOADER",
            help="A function that returns a loader: its batches are tensors, tuples whose first element is the input, "
            "or dicts of keyword arguments. Labels are not needed.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="The new weights: .safetensors, or a state dict for torch.load.",
        ),
    ],
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Weights to load first: .safetensors, or a state dict saved by torch.save.  "
            "[default: what the model comes with]",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Stop after N samples.  [default: by the tolerance]"),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0.0, metavar="SIGMA", help="Stop when every mean is known this well; 0 for all the data."
        ),
    ] = 0.01,
    mode: Annotated[
        Mode, typer.Option(help="One pass, or a pass a layer and exact for small and sorted batches.")
    ] = Mode.JOINT,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    json: Annotated[
        str | None,
        typer.Option(
            "--json", metavar="FILE", help="Write JSON to FILE ('-': to stdout, and nothing else there)."
        ),
    ] = None,
) -> None:
    """Set the running statistics of every batch norm to those of your data, and save the weights.

    For weights that were averaged or merged, for statistics that small or bad
    batches have spoilt, and for data of another origin than the training data.
    """
    with guarded(context, "interrupted: nothing was written"):
        _check_targets(out, json, weights)
        with users_code():
            network, loader = _model(model, weights, device), _loader(data)
        with users_code():
            from batchnorm.stats import recalibrate

            result = recalibrate(
                network, loader, samples=samples, tolerance=tolerance, mode=mode.value, group=False
            )
        _present(network, result, out, json)


def _check_targets(out: Path, json: str | None, weights: Path | None) -> None:
    if weights is not None and weights.exists() and out.exists() and weights.samefile(out):
        raise InputError(
            message(
                "--out",
                got=f"{out}, the file of --weights",
                expected="another file: a checkpoint may hold more than the weights",
            )
        )
    check_writable(out)
    check_json_target(json)
    if json not in (None, STDOUT) and Path(str(json)).resolve() == out.resolve():
        raise InputError(message("--json", got=f"the same file as --out, {out}", expected="another file"))

    from batchnorm.cli._weights import check_format

    check_format(out)


def _model(spec: str, weights: Path | None, device: str) -> "nn.Module":
    from batchnorm.cli._factory import load_model
    from batchnorm.cli._weights import load_weights, place

    network = load_model(spec, "MODEL")()
    if weights is not None:
        load_weights(network, weights)
    return place(network, device)


def _loader(spec: str) -> Any:
    from batchnorm.cli._factory import load_data

    return load_data(spec, "--data")


def _present(network: "nn.Module", result: "Recalibration", out: Path, json: str | None) -> None:
    """Write the weights and the JSON, and print what was done. What fails does not keep the rest from it."""
    from batchnorm.cli._weights import save_weights

    console = stderr() if json == STDOUT else stdout()
    written: list[str] = []

    def save() -> None:
        save_weights(network, out)
        written.append(f"weights: {out}")

    def save_json() -> None:
        path = write_json(result.to_json(), json)
        if path is not None:
            written.append(f"json: {path}")

    def print_result() -> None:
        if json != STDOUT:
            console.print(str(result), soft_wrap=True, markup=False)

    def print_places() -> None:
        for line in written:
            console.print(line, soft_wrap=True, markup=False)

    attempt_all(save, save_json, print_result, print_places)
