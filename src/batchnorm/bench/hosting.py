"""`measure_host`: what the host needs to launch a layer, forward and backward."""

from collections.abc import Sequence
from itertools import product
from typing import Any

from batchnorm.bench import process
from batchnorm.bench.asking import ask_machine
from batchnorm.bench.case import SIZES, Case
from batchnorm.bench.host_times import HostTimes
from batchnorm.bench.plan import LAYOUTS, Settings, check_common, known
from batchnorm.bench.process import WorkerError
from batchnorm.bench.progress import Progress, Silent, carried_out
from batchnorm.bench.record import OURS, Record
from batchnorm.bench.suites import EPILOGUES
from batchnorm.bench.wording import seconds

__all__ = ["host_case", "measure_host"]

# 512 values: some hundred nanoseconds of arithmetic on a CPU.
_SHAPE = (4, 8, 4, 4)


def measure_host(
    *,
    layouts: Sequence[str] = LAYOUTS,
    dtypes: Sequence[str] = ("float32",),
    device: str = "cpu",
    epilogues: Sequence[str] = ("relu", "residual+relu"),
    threads: int | None = None,
    rounds: int = 5,
    backend: str | None = None,
    progress: Progress | None = None,
) -> HostTimes:
    """Time the host for each of 50 layers in a chain, on tensors so small that their arithmetic is nothing.

    It is what bounds small networks on a CPU, and on a GPU every step that the host launches: a GPU that computes
    faster than the host launches waits for it. A step that is replayed as a CUDA graph does without the host.

    Args:
        layouts: "contiguous", "channels-last"; or "all".
        dtypes: of the input: "float32", "bfloat16", "float16", "float64".
        device: "cpu", "cuda" or "cuda:N"; on a GPU the device is idle when a sample begins and is not waited for.
        epilogues: what follows each layer: "none", "relu", "relu6", "residual", "residual+relu".
        threads: of the CPU; one by default.
        rounds: how often everyone is timed in turn.
        backend: what runs our layers, a name that `batchnorm.explain_backend` lists; None or "auto" for the usual
            choice.
        progress: told what is going on; see `batchnorm.bench.Progress`.

    Returns:
        Times a layer. After Ctrl-C those of the finished cases, with `interrupted` set.

    Raises:
        InputError: an option is not known, or the device does not answer.
        BackendError: the backend cannot run on the device.
        KeyboardInterrupt: stopped before the first case was finished.

    Example:
        >>> from batchnorm.bench import measure_host
        >>> result = measure_host(layouts=["contiguous"], rounds=1)  # doctest: +SKIP
        >>> print(result.verdict)  # doctest: +SKIP
    """
    settings = Settings(
        suites=(),
        layouts=known("layout", layouts, LAYOUTS, every=LAYOUTS),
        dtypes=known("dtype", dtypes, tuple(SIZES)),
        device=device,
        epilogues=known("epilogue", epilogues, tuple(EPILOGUES), every=("none", "relu", "residual+relu")),
        threads=threads or 1,
        rounds=rounds,
        backend=check_common(device, None, threads, rounds, backend),
    )
    work, shown = _Work(settings), progress or Silent()

    def result(interrupted: bool) -> HostTimes:
        return HostTimes(
            settings=settings,
            machine=work.machine,
            records=tuple(work.records),
            planned=len(work.planned),
            interrupted=interrupted,
        )

    return carried_out(lambda: _run(work, shown), shown, lambda: bool(work.records), result)


def host_case(layout: str, dtype: str, epilogue: str, device: str, backend: str | None) -> Case:
    """A layer of the chain."""
    return Case("host", _SHAPE, 1, epilogue, layout, dtype, device, None, "as-is", backend)


class _Work:
    """What is finished so far; it outlives an interruption."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        kinds = product(settings.layouts, settings.dtypes, settings.epilogues)
        self.planned = [host_case(*kind, settings.device, settings.backend) for kind in kinds]
        self.machine: dict[str, Any] = {}
        self.records: list[Record] = []


def _run(work: _Work, progress: Progress) -> None:
    settings = work.settings
    progress.start(float(len(work.planned)), len(work.planned), "the host's time for a layer")
    progress.case_started("this machine")
    answer = ask_machine(settings.device, settings.dtypes, settings.backend, settings.threads, copy=False)
    work.machine = dict(answer["machine"])
    job = {
        "task": "host",
        "device": settings.device,
        "threads": settings.threads,
        "rounds": settings.rounds,
        "cases": [vars(case) for case in work.planned],
    }
    answers = process.work(job)
    for case in work.planned:
        label = f"{case.epilogue}, {case.layout}, {case.dtype}"
        progress.case_started(label)
        found = next(answers, None)
        if found is None:
            raise WorkerError("the process ended before it had answered")
        record = Record.read(case, found)
        work.records.append(record)
        times = record.times["forward+backward"]
        told = ", ".join(f"{seconds(times[name].p50)} {'ours' if name == OURS else name}" for name in times)
        progress.case_finished(label, 1.0, told)
