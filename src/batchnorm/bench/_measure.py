"""`measure`: the run over all cases, and what is finished when it ends or is stopped."""

import os
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from batchnorm.bench import process
from batchnorm.bench.asking import ask_machine
from batchnorm.bench.case import MEMORY, Case
from batchnorm.bench.hosting import host_case
from batchnorm.bench.plan import DEFAULT_SUITES, LAYOUTS, Settings, cases, checked
from batchnorm.bench.process import WorkerError
from batchnorm.bench.progress import Progress, Silent, carried_out
from batchnorm.bench.record import OURS, Record
from batchnorm.bench.result import Benchmark

__all__ = ["measure"]

# Of the cores: with this much at work already, times begin to scatter.
_BUSY = 0.25
# Between the start's and the end's speed of a copy: the machine was not the same throughout.
_DRIFT = 1.25


class _Work:
    """What a benchmark has finished so far; it outlives an interruption."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.planned = cases(settings)
        self.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        self.machine: dict[str, Any] = {}
        self.copy = 0.0
        self.copy_after: float | None = None
        self.host: dict[str, float] = {}
        self.records: list[Record] = []


def measure(
    suites: Sequence[str] = DEFAULT_SUITES,
    *,
    layouts: Sequence[str] = LAYOUTS,
    dtypes: Sequence[str] = ("float32",),
    device: str = "cpu",
    against: Sequence[str] = ("eager",),
    epilogues: Sequence[str] = (),
    batch: int | None = None,
    threads: int | None = None,
    rounds: int = 5,
    memory: Sequence[str] = MEMORY,
    backend: str | None = None,
    progress: Progress | None = None,
) -> Benchmark:
    """Time the layers of this package against PyTorch's on the shapes of real networks, and check both.

    Each case (a shape, its layout and type, what follows it, how its process gets memory) is measured in a process of
    its own, in which everyone is timed in turn; on a GPU one process measures all. Outputs and gradients are compared
    with float64, and a layer of ours that is wrong gets no time.

    Args:
        suites: "resnet50", "mobilenet_v2", "densenet121", "unet3d", "tabular", "tiny"; or "all".
        layouts: "contiguous", "channels-last"; or "all".
        dtypes: of the input: "float32", "bfloat16", "float16", "float64". A half type's parameters are float32.
        device: "cpu", "cuda" or "cuda:N".
        against: "eager" (PyTorch's layer and functions), "compile" (the same under torch.compile), "cudnn" (cuDNN's
            fused graph: CUDA, channels-last, half types, and the package nvidia-cudnn-frontend).
        epilogues: what follows the layer: "none", "relu", "relu6", "residual", "residual+relu"; "all" for none, relu
            and residual+relu on every shape; empty for what follows it in the network.
        batch: N of every shape; by default each suite has one of its own for CPUs and one for GPUs.
        threads: of the CPU; by default PyTorch's, and one for "tiny".
        rounds: how often everyone is timed in turn; a shape's ratio is the median over rounds.
        memory: "as-is" and, on a CPU with glibc, "raised": its mmap and trim thresholds so high that a process keeps
            what memory it has once got.
        backend: what runs our layer, a name that `batchnorm.explain_backend` lists; None or "auto" for the usual
            choice.
        progress: told what is going on; see `batchnorm.bench.Progress`.

    Returns:
        Times, errors, mean ratios. After Ctrl-C those of the finished cases, with `interrupted` set.

    Raises:
        InputError: an option is not known, or the device does not answer.
        BackendError: the backend cannot run on the device.
        KeyboardInterrupt: stopped before the first case was finished.

    Example:
        >>> from batchnorm.bench import measure
        >>> result = measure("tiny", memory=["as-is"], rounds=1)  # doctest: +SKIP
        >>> print(result.verdict)  # doctest: +SKIP
    """
    settings = checked(
        suites, layouts, dtypes, device, against, epilogues, batch, threads, rounds, memory, backend
    )
    work, shown = _Work(settings), progress or Silent()
    return carried_out(
        lambda: _run(work, shown), shown, lambda: bool(work.records), lambda stopped: _result(work, stopped)
    )


def _run(work: _Work, progress: Progress) -> None:
    total = sum(_effort(case) for case in work.planned)
    progress.start(total, len(work.planned), ", ".join(work.settings.suites))
    progress.case_started("this machine, and how fast it copies memory")
    work.machine, work.copy = _machine(work.settings)
    # A GPU's memory comes from PyTorch's cache: one process serves all cases of a number of threads.
    apart = work.settings.device == "cpu"
    for _, group in groupby(enumerate(work.planned), lambda pair: pair[0] if apart else pair[1].threads):
        _measure_together([case for _, case in group], work, progress)
    if not apart:
        progress.case_started("the host's time for a layer")
        work.host = _host(work.settings)
    progress.case_started("how fast memory is copied now")
    work.copy_after = _machine(work.settings)[1]


def _machine(settings: Settings) -> tuple[dict[str, Any], float]:
    answer = ask_machine(settings.device, settings.dtypes, settings.backend, settings.threads)
    return answer["machine"], answer["copy"]


def _host(settings: Settings) -> dict[str, float]:
    """The host's seconds for a layer with ReLU, forward and backward."""
    case = host_case("contiguous", "float32", "relu", settings.device, settings.backend)
    (answer,) = process.work(_job(settings, "host", cases=[vars(case)]))
    return {name: times["p50"] for name, times in answer["times"]["forward+backward"].items()}


def _measure_together(group: list[Case], work: _Work, progress: Progress) -> None:
    """Measure cases in one process, and in another one what is left when it ends early."""
    while group:
        progress.case_started(str(group[0]))
        job = _job(work.settings, "cases", threads=group[0].threads, cases=[vars(case) for case in group])
        try:
            for answer in process.work(job, group[0].memory):
                _note(Record.read(group.pop(0), answer), work, progress)
                if group:
                    progress.case_started(str(group[0]))
        except WorkerError as error:
            _note(Record(group.pop(0), failure=str(error)), work, progress)


def _note(record: Record, work: _Work, progress: Progress) -> None:
    work.records.append(record)
    progress.case_finished(str(record.case), _effort(record.case), _outcome(record))


def _job(settings: Settings, task: str, **more: Any) -> dict[str, Any]:
    return {
        "task": task,
        "device": settings.device,
        "threads": settings.threads,
        "against": settings.against,
        "rounds": settings.rounds,
        "backend": settings.backend,
        **more,
    }


def _effort(case: Case) -> float:
    """About how many seconds a case takes: starting PyTorch, and working on its tensors (new memory costs more)."""
    return 2.0 + case.bytes * (1.0e-7 if case.memory == "as-is" else 0.4e-7)


def _outcome(record: Record) -> str:
    """A training step's time and ratio, in a few words."""
    if record.failure:
        return f"failed: {record.failure}"
    operation = "forward+backward"
    timing = record.times[operation][OURS]
    ratios = [
        f"{record.ratio(operation, name):.2f}× {name}" for name in record.times[operation] if name != OURS
    ]
    return ", ".join([f"{timing.p50 * 1e3:.3g} ms", *ratios])


def _result(work: _Work, interrupted: bool) -> Benchmark:
    return Benchmark(
        settings=work.settings,
        machine={**work.machine, "load": work.load},
        copy=work.copy,
        copy_after=work.copy_after,
        records=tuple(work.records),
        planned=len(work.planned),
        host=work.host,
        warnings=tuple(_warnings(work)),
        interrupted=interrupted,
    )


def _warnings(work: _Work) -> list[str]:
    found = []
    cores = work.machine["cores"]
    if work.load > _BUSY * cores:
        found.append(
            f"The machine was busy when this began: a load of {work.load:.1f} on {cores} cores. Times scatter, and "
            "ratios with them; repeat this with nothing else running."
        )
    if work.copy_after is not None and not 1 / _DRIFT < work.copy_after / work.copy < _DRIFT:
        found.append(
            f"Memory was copied at {work.copy / 1e9:.1f} GB/s at the start and at {work.copy_after / 1e9:.1f} GB/s at "
            "the end: something else ran on this machine in between, so shares of the copy's speed are uncertain."
        )
    skipped = {(name, reason) for record in work.records for name, reason in record.skipped.items()}
    found += [f"Not compared with {name}: {reason}." for name, reason in sorted(skipped)]
    plain = {
        f"{name} in {operation}"
        for record in work.records
        for operation, times in record.times.items()
        for name, timing in times.items()
        if timing.replayed is False
    }
    if plain:
        found.append(
            "Launched by the host, since it could not be captured as a CUDA graph, so that the host's time is in it: "
            f"{', '.join(sorted(plain))}."
        )
    return found
