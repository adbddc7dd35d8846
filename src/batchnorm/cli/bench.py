"""`batchnorm bench`: time layers, the host or whole training steps against PyTorch's, and check them."""

from collections.abc import Callable
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
    from batchnorm.bench import Benchmark, HostTimes, Synchronization, TrainingSteps

    Result = Benchmark | HostTimes | Synchronization | TrainingSteps

__all__ = ["command"]

_NOTHING = "interrupted: nothing was finished, no result was written"
FAILED = 1


def command(
    context: typer.Context,
    what: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="layers: on real networks' shapes. host: launching a layer. step: whole training steps.",
        ),
    ] = "layers",
    network: Annotated[
        str,
        typer.Option(metavar="NAME", help="Of --what step: resnet18, resnet50, or torchvision's name of it."),
    ] = "resnet50",
    suite: Annotated[
        str,
        typer.Option(
            metavar="NAMES", help="resnet50, mobilenet_v2, densenet121, unet3d, tabular, tiny, or all."
        ),
    ] = "resnet50,tiny",
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="contiguous, channels-last.  [default: both; channels-last for --what step]"
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="NAMES", help="float32, bfloat16, float16, float64. --what step: autocast.")
    ] = "float32",
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N.")] = "cpu",
    backend: Annotated[
        str, typer.Option(metavar="NAME", help="What runs our layers: auto, cpu, triton, aten, reference.")
    ] = "auto",
    against: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="eager (torch.nn and torch.relu), compile (them under torch.compile), cudnn (its fused graph).",
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
        typer.Option(
            min=2,
            metavar="N",
            help="Samples in a batch.  [default: the suite's, 16 for resnet50; 8 or, on cuda, 128 for --what step]",
        ),
    ] = None,
    image: Annotated[
        int, typer.Option(min=32, metavar="N", help="Of --what step: the images' side in pixels.")
    ] = 224,
    threads: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Threads of the CPU.  [default: torch's; 1 for tiny and host]"),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="How often everyone is timed in turn.  [default: 5; 10 for --what step]"
        ),
    ] = None,
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
    """Time batch norm against PyTorch's.

    --what layers: forward, forward and backward, and inference on the shapes of
    real networks; both are checked against float64, and a layer that is wrong
    gets no time. --what host: what the host needs to launch a layer. --what
    step: training steps of a network as it is, with its batch norms fused, and
    without them. --distributed: forward and backward of synchronized layers,
    --batch samples in each process (2). NAMES have commas between them. Ctrl-C
    shows and writes what is finished.
    """
    with guarded(context, _NOTHING), Interrupts() as interrupts:
        _check_options(context, what, distributed)
        _check_targets(html, markdown, json)
        layouts = (layout or ("channels-last" if what == "step" else "contiguous,channels-last")).split(",")
        options: dict[str, Any] = {
            "layouts": layouts,
            "dtypes": dtype.split(","),
            "device": device,
            "threads": threads,
            "rounds": rounds or (10 if what == "step" else 5),
            "backend": backend,
        }
        if what == "step":
            options |= {"network": network, "batch": batch, "image": image}
        elif what == "host":
            options |= {} if epilogue == "network" else {"epilogues": epilogue.split(",")}
        elif distributed:
            options |= {"suites": suite.split(","), "batch": batch, "processes": processes or 2}
        else:
            options |= {"suites": suite.split(","), "batch": batch, "against": against.split(",")}
            options |= {"epilogues": epilogue.split(","), "memory": malloc.split(",")}
        result = _run("distributed" if distributed else what, options)
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


_LAYERS = ("suite", "against", "epilogue", "malloc", "markdown")
# What would say nothing there.
_VOID = {
    "layers": ("network", "image", "processes"),
    "host": (
        "network",
        "image",
        "processes",
        "suite",
        "against",
        "batch",
        "malloc",
        "markdown",
        "distributed",
    ),
    "step": ("processes", *_LAYERS, "distributed"),
    "distributed": ("network", "image", "against", "epilogue", "malloc", "markdown"),
}


def _check_options(context: typer.Context, what: str, distributed: bool) -> None:
    """Refuse an option that would say nothing."""
    if what not in ("layers", "host", "step"):
        raise InputError(message("--what", got=repr(what), expected="layers, host or step"))
    kind = "distributed" if distributed and what == "layers" else what
    for name in _VOID[kind]:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InputError(message(f"--{name}", got="a value", expected=_expected(name, kind)))


def _expected(name: str, kind: str) -> str:
    if name == "processes":
        return "it with --distributed alone"
    if kind == "distributed":
        return (
            "it without --distributed alone"
            if name not in ("network", "image")
            else "it with --what step alone"
        )
    fitting = [each for each in ("layers", "host", "step") if name not in _VOID[each]]
    return f"it with --what {' or '.join(fitting)} alone"


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


def _run(what: str, options: dict[str, Any]) -> "Result":
    from batchnorm import bench
    from batchnorm.cli._bench_progress import BenchDisplay

    measures: dict[str, Callable[..., Result]] = {
        "layers": bench.measure,
        "host": bench.measure_host,
        "step": bench.measure_steps,
        "distributed": bench.measure_distributed,
    }
    with BenchDisplay(stderr()) as progress:
        return measures[what](progress=progress, **options)


def _present(result: "Result", html: Path | None, markdown: Path | None, json: str | None) -> None:
    """Write the files, print the tables, and say where the files lie."""
    from batchnorm.bench import Benchmark

    def page() -> str | None:
        if html is None:
            return None
        result.save(html)
        return f"report: {html}"

    def table() -> str | None:
        # Half a benchmark, or one in which something is wrong, is no table to publish.
        if markdown is None or not isinstance(result, Benchmark) or result.interrupted or result.failures:
            return None
        from batchnorm.bench.readme import refresh

        refresh(markdown, result)
        return f"table: {markdown}"

    present(result, json, page, table)
