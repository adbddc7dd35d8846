"""`batchnorm env`: versions, devices, threads, and the backend that each device gets."""

from typing import TYPE_CHECKING, Annotated

import typer

from batchnorm.cli._output import check_json_target, guarded, stdout, write_json

if TYPE_CHECKING:
    from batchnorm._environment import Environment
    from batchnorm.report.document import Document

__all__ = ["command"]


def command(
    context: typer.Context,
    json: Annotated[
        str | None,
        typer.Option(
            "--json", metavar="FILE", help="Write JSON to FILE ('-': to stdout, in place of the table)."
        ),
    ] = None,
) -> None:
    """Show versions, devices, threads, and which backend runs batch norm on each device and why."""
    with guarded(context):
        check_json_target(json)

        from batchnorm._environment import describe

        environment = describe()
        path = write_json(environment.to_json(), json)
        if json == "-":
            return

        from batchnorm.report import terminal

        console = stdout()
        console.print(terminal.render(document(environment)))
        if path is not None:
            console.print(f"\njson: {path}", soft_wrap=True, markup=False)


def document(environment: "Environment") -> "Document":
    """Return the environment as a document."""
    from batchnorm.report.document import Document, Section, Table

    rows = [
        (device.name, device.model, device.backend or "none", _why(device.why, device.refused))
        for device in environment.devices
    ]
    devices = Table(("device", "model", "backend", "why"), rows, caption="Training with float32 input (N, C)")
    return Document(
        title=f"batchnorm {environment.batchnorm}",
        verdict=f"torch {environment.torch}, {_count(environment.cores, 'core')}, "
        f"{_count(environment.threads, 'thread')}, {_count(len(environment.devices), 'device')}.",
        sections=[Section("Devices", [devices])],
        facts={
            "python": environment.python,
            "torch": environment.torch,
            "numpy": environment.numpy,
            "system": environment.system,
            "cpu": environment.cpu,
            "cores": str(environment.cores),
            "torch threads": str(environment.threads),
            "compiled kernels": environment.extension,
        },
    )


def _why(note: str, refused: dict[str, str]) -> str:
    return "; ".join([note, *(f"not {name}: {reason}" for name, reason in refused.items())])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
