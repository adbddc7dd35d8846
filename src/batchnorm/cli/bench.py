"""`batchnorm bench`: time the layers against PyTorch's, and check both."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchnorm._errors import InputError, message
from batchnorm._files import Interrupts, check_writable
from batchnorm.cli._output import (
    STDOUT,
    JsonTarget,
    check_json_target,
    check_page_target,
    guarded,
    interrupted,
    present,
    stderr,
)

if TYPE_CHECKING:
    from batchnorm.bench import Benchmark, Synchronization

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
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            help="Time SyncBatchNorm in several processes on this machine: on a CPU (gloo) against the layer without "
            "synchronization, on cuda (NCCL, a GPU each) against torch.nn.SyncBatchNorm as well.",
        ),
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="How many, with --distributed.  [default: 2]"),
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one HTML page.")] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Renew the table between the markers of a Markdown file."),
    ] = None,
    json: JsonTarget = None,
) -> None:
    """Time batch norm against PyTorch's on the shapes of real networks.

    Forward, forward and backward, and inference; both are checked against
    float64, and a layer that is wrong gets no time. NAMES have commas between
    them. With --distributed: forward and backward of synchronized layers, --batch
    samples in each process (2). Ctrl-C shows and writes what is finished.
    """
    with guarded(context, _NOTHING), Interrupts() as interrupts:
        _check_options(context, distributed)
        _check_targets(html, markdown, json)
        common = {
            "suites": suite.split(","),
            "layouts": layout.split(","),
            "dtypes": dtype.split(","),
            "device": device,
            "batch": batch,
            "threads": threads,
            "rounds": rounds,
        }
        result: Benchmark | Synchronization
        if distributed:
            result = _run_distributed(processes=processes or 2, **common)
        else:
            lists = {"against": against, "epilogues": epilogue, "memory": malloc}
            result = _run(**common, **{name: text.split(",") for name, text in lists.items()})
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


def _check_options(context: typer.Context, distributed: bool) -> None:
    """Refuse an option that would say nothing."""
    void = ("against", "epilogue", "malloc", "markdown") if distributed else ("processes",)
    for name in void:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            expected = "without --distributed" if distributed else "with --distributed"
            raise InputError(message(f"--{name}", got="a value", expected=f"it {expected} alone"))


def _check_targets(html: Path | None, markdown: Path | None, json: str | None) -> None:
    """Find out now, not after the measurements, that a result could not be written."""
    if html is not None:
        check_page_target(html, "--html")
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


def _run_distributed(**options: Any) -> "Synchronization":
    from batchnorm.bench import measure_distributed
    from batchnorm.cli._bench_progress import BenchDisplay

    with BenchDisplay(stderr()) as progress:
        return measure_distributed(progress=progress, **options)


def _present(
    result: "Benchmark | Synchronization", html: Path | None, markdown: Path | None, json: str | None
) -> None:
    """Write the files, print the tables, and say where the files lie."""
    from batchnorm.bench import Synchronization

    def page() -> str | None:
        if html is None:
            return None
        result.save(html)
        return f"report: {html}"

    def table() -> str | None:
        # Half a benchmark, or one in which something is wrong, is no table to publish.
        if markdown is None or isinstance(result, Synchronization) or result.interrupted or result.failures:
            return None
        from batchnorm.bench.readme import refresh

        refresh(markdown, result)
        return f"table: {markdown}"

    present(result, json, page, table)
