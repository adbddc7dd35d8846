"""`batchnorm compare`: train a network with and without batch norm, and write the report."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchnorm._errors import InputError, message
from batchnorm._files import Interrupts
from batchnorm.cli._output import (
    STDOUT,
    JsonTarget,
    check_json_target,
    check_page_target,
    guarded,
    interrupted,
    present,
    stderr,
    users_code,
)

if TYPE_CHECKING:
    from batchnorm.comparison import Comparison

__all__ = ["command"]

_NETWORK = "deep-mlp"
_NOTHING = "interrupted: nothing was finished, no report was written"


def _rate(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        parts = text.replace(";", ",").split(",")
        hint = (
            f" Repeat the option: {' '.join(f'--lr {part.strip()}' for part in parts)}."
            if len(parts) > 1
            else ""
        )
        raise typer.BadParameter(f"{text!r} is not a number.{hint}") from None


class Optimizer(StrEnum):
    """The optimizers to choose from."""

    SGD = "sgd"
    MOMENTUM = "momentum"
    ADAM = "adam"


class Task(StrEnum):
    """What can be learned."""

    CLASSIFICATION = "classification"
    REGRESSION = "regression"


def command(
    context: typer.Context,
    network: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"Built-in network: mlp, deep-mlp or cnn.  [default: {_NETWORK}]"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FACTORY", help="Your own: a function that returns a torch.nn.Module."),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            metavar="NAME|FOLDER|MODULE:FACTORY",
            help="Built-in data (digits, mnist5k, fashion-mnist, segment, segment-standardized or bikeshare), a folder "
            "with MNIST's files, or a function that returns (train_loader, test_loader) or four arrays (x_train, "
            "y_train, x_test, y_test).",
        ),
    ] = "digits",
    task: Annotated[
        Task | None,
        typer.Option(
            help="What is learned: classes (accuracy) or numbers (R²).  "
            "[default: that of the built-in data; classification for your own]",
        ),
    ] = None,
    lr: Annotated[
        list[float] | None,
        typer.Option(
            metavar="RATE",
            parser=_rate,
            help="Learning rate; give it several times for a sweep.  "
            "[default: seven that suit network and optimizer; 0.003 to 3 for deep-mlp]",
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, metavar="N", help="Pairs of trainings at each learning rate.")
    ] = 3,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Optimizer steps of each training.  [default: 500; 1000 for mlp, 300 for cnn]",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Samples in a batch; not with loaders.  [default: 64, or all where there are fewer]",
        ),
    ] = None,
    optimizer: Annotated[Optimizer, typer.Option(help="Optimizer.")] = Optimizer.SGD,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    dynamics: Annotated[
        bool,
        typer.Option(
            "--dynamics/--no-dynamics",
            help="Train both networks of every seed once more and watch drift, covariate shift and smoothness.",
        ),
    ] = True,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The report, one HTML file.")] = Path(
        "batchnorm-report.html"
    ),
    json: JsonTarget = None,
) -> None:
    """Train the same network with and without batch norm and show what it changes.

    Both start from the same weights and see the same batches, at several
    learning rates and seeds. Ctrl-C, or an error on the way, writes the report
    of what is finished.
    """
    with guarded(context, _NOTHING), Interrupts() as interrupts:
        _check_targets(out, json)
        comparison, error = _run(
            model=_model(network, model),
            data=_data(data),
            task=None if task is None else task.value,
            lrs=lr or None,
            seeds=seeds,
            steps=steps,
            batch_size=batch_size,
            optimizer=optimizer.value,
            device=device,
            dynamics=dynamics,
        )
        # Hours of work are in memory alone: from here on Ctrl-C waits until they are written.
        interrupts.hold()
        try:
            _present(comparison, out, json, error)
        finally:
            if comparison.interrupted:
                why = "interrupted" if error is None else "stopped by an error"
                stderr().print(f"{why}: the results are those of the trainings that had finished")
        if comparison.interrupted or interrupts.pressed:
            raise interrupted()


def _check_targets(out: Path, json: str | None) -> None:
    """Find out now, not after the trainings, that a result could not be written."""
    check_page_target(out, "--out", fix="JSON goes to --json FILE.")
    check_json_target(json)
    if json not in (None, STDOUT) and Path(str(json)).resolve() == out.resolve():
        raise InputError(message("--json", got=f"the same file as --out, {out}", expected="another file"))


def _model(network: str | None, model: str | None) -> Any:
    if model is None:
        return network or _NETWORK
    if network is not None:
        raise InputError(
            message("--network and --model", got="both", expected="one of them", fix="Leave one of them out.")
        )
    from batchnorm.cli._factory import load_model

    with users_code():
        return load_model(model, "--model")


def _data(data: str) -> Any:
    from batchnorm.cli._factory import is_spec, load_data

    if not is_spec(data):
        return data
    with users_code():
        return load_data(data, "--data")


def _run(model: Any, data: Any, **options: Any) -> tuple["Comparison", Exception | None]:
    """Compare; an error that leaves finished trainings comes back with them."""
    from batchnorm.cli._progress import display
    from batchnorm.comparison import compare

    with display(stderr()) as progress, users_code():
        try:
            return compare(model, data, progress=progress, **options), None
        except Exception as error:
            finished: Comparison | None = getattr(error, "comparison", None)
            if finished is None:
                raise
            return finished, error


def _present(comparison: "Comparison", out: Path, json: str | None, error: Exception | None) -> None:
    """Write the files, print the verdicts, and say where the files lie; then raise the error, if there is one."""

    def page() -> str:
        comparison.save(out)
        return f"report: {out}"

    def fail() -> None:
        if error is not None:
            raise error

    present(comparison, json, page, fail)
