"""`batchnorm bench`: time the layers against PyTorch's, and check both."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchnorm._errors import InputError, OutputError, message
from batchnorm._files import Interrupts, check_writable
from batchnorm.cli._output import (
    STDOUT,
    attempt_all,
    check_json_target,
    guarded,
    interrupted,
    stderr,
    stdout,
    write_json,
)

if TYPE_CHECKING:
    from batchnorm.bench import Benchmark

__all__ = ["command"]

_NOTHING = "interrupted: nothing was finished, no result was written"
FAILED = 1


def command(
    context: typer.Context,
    suite: Annotated[
        str,
        typer.Option(
            metavar="NAMES", help="resnet50, mobilenet_v2, densenet121, unet3d, tabular, tiny, or all."
        ),
    ] = "resnet50,tiny",
    layout: Annotated[
        str, typer.Option(metavar="NAMES", help="contiguous, channels-last.")
    ] = "contiguous,channels-last",
    dtype: Annotated[
        str, typer.Option(metavar="NAMES", help="float32, bfloat16, float16, float64.")
    ] = "float32",
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N.")] = "cpu",
    against: Annotated[
        str,
        typer.Option(
            metavar="NAMES", help="eager (torch.nn and torch.relu), compile (them under torch.compile)."
        ),
    ] = "eager",
    epilogue: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="What follows on every shape: none, relu, relu6, residual, residual+relu; all for none, relu and "
            "residual+relu; network for what follows in the network.",
        ),
    ] = "network",
    batch: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Samples in a batch.  [default: the suite's, 16 for resnet50]"),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Threads of the CPU.  [default: torch's; 1 for tiny]"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="How often everyone is timed in turn.")] = 5,
    malloc: Annotated[
        str,
        typer.Option(metavar="NAMES", help="as-is, raised: glibc's thresholds, a process for each."),
    ] = "as-is,raised",
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one HTML page with charts.")
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Renew the table between the markers of a Markdown file."),
    ] = None,
    json: Annotated[
        str | None,
        typer.Option(
            "--json", metavar="FILE", help="Write JSON to FILE ('-': to stdout, and nothing else there)."
        ),
    ] = None,
) -> None:
    """Time batch norm against PyTorch's on the shapes of real networks.

    Forward, forward and backward, and inference; both are checked against
    float64, and a layer that is wrong gets no time. NAMES have commas between
    them. Ctrl-C shows and writes what is finished.
    """
    with guarded(context, _NOTHING), Interrupts() as interrupts:
        _check_targets(html, markdown, json)
        result = _run(
            suites=suite.split(","),
            layouts=layout.split(","),
            dtypes=dtype.split(","),
            device=device,
            against=against.split(","),
            epilogues=epilogue.split(","),
            batch=batch,
            threads=threads,
            rounds=rounds,
            memory=malloc.split(","),
        )
        # Minutes of work are in memory alone: from here on Ctrl-C waits until they are written.
        interrupts.hold()
        try:
            _present(result, html, markdown, json)
        finally:
            if result.interrupted:
                stderr().print("interrupted: the results are those of the cases that had finished")
        if result.interrupted or interrupts.pressed:
            raise interrupted()
        if result.failures:
            raise typer.Exit(FAILED)


def _check_targets(html: Path | None, markdown: Path | None, json: str | None) -> None:
    """Find out now, not after the measurements, that a result could not be written."""
    if html is not None:
        if html.suffix.lower() not in (".html", ".htm"):
            raise OutputError(message("--html", got=str(html), expected="a file that ends in .html"))
        check_writable(html)
        from batchnorm.report import html as renderer

        renderer.check_available()
    if markdown is not None:
        from batchnorm.bench.readme import replaced

        check_writable(markdown)
        replaced(markdown, "")
    check_json_target(json)
    files = [Path(path).resolve() for path in (html, markdown, json) if path not in (None, STDOUT)]
    if len(set(files)) < len(files):
        raise InputError(
            message("--html, --markdown and --json", got="the same file twice", expected="a file for each")
        )


def _run(**options: Any) -> "Benchmark":
    from batchnorm.bench import measure
    from batchnorm.cli._bench_progress import BenchDisplay

    with BenchDisplay(stderr()) as progress:
        return measure(progress=progress, **options)


def _present(result: "Benchmark", html: Path | None, markdown: Path | None, json: str | None) -> None:
    """Print the tables, write the files, and say where they lie. What fails does not keep the rest from it."""
    console = stderr() if json == STDOUT else stdout()
    written: list[str] = []

    def save_page() -> None:
        if html is not None:
            result.save(html)
            written.append(f"report: {html}")

    def save_json() -> None:
        path = write_json(result.to_json(), json)
        if path is not None:
            written.append(f"json: {path}")

    def renew_table() -> None:
        # Half a benchmark, or one in which something is wrong, is no table to publish.
        if markdown is not None and not result.interrupted and not result.failures:
            from batchnorm.bench.readme import refresh

            refresh(markdown, result)
            written.append(f"table: {markdown}")

    def print_tables() -> None:
        from batchnorm.report import terminal

        if json != STDOUT:
            console.print(terminal.render(result.document(), brief=True))
            console.print()

    def print_places() -> None:
        for line in written:
            console.print(line, soft_wrap=True, markup=False)

    attempt_all(save_page, save_json, renew_table, print_tables, print_places)
