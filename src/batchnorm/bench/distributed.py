"""`measure_distributed`: what synchronizing costs a layer, between processes on this machine."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from batchnorm._errors import InputError, message
from batchnorm.bench import process
from batchnorm.bench.case import Case
from batchnorm.bench.plan import LAYOUTS, Settings, cases, checked
from batchnorm.bench.process import WorkerError
from batchnorm.bench.progress import Progress, Silent, carried_out
from batchnorm.bench.record import Record
from batchnorm.bench.synchronization import Exchange, Synchronization, took

__all__ = ["measure_distributed"]

# What synchronizing costs hardly depends on a tensor's size, so a few sizes of each network tell it.
_SHAPES = 6
# N of each process: synchronized statistics are for those who have so few.
_BATCH = 2


def measure_distributed(
    suites: Sequence[str] = ("resnet50",),
    *,
    processes: int = 2,
    layouts: Sequence[str] = LAYOUTS,
    dtypes: Sequence[str] = ("float32",),
    device: str = "cpu",
    batch: int | None = None,
    threads: int | None = None,
    rounds: int = 5,
    backend: str | None = None,
    progress: Progress | None = None,
) -> Synchronization:
    """Time `SyncBatchNorm` in several processes on this machine, forward and backward, and check it.

    All processes run the same calls in step, on gloo and the CPU or on NCCL and a GPU each; a sample is the slowest
    one's. On GPUs PyTorch's SyncBatchNorm is timed beside ours; on a CPU it does not run. Our layer without
    synchronization, on the same part of the batch, shows what synchronizing costs. Outputs and gradients are compared
    with float64 on the whole batch, and a layer of ours that is wrong gets no time.

    Args:
        suites: as for `measure`; up to six shapes of each, from the largest to the smallest.
        processes: how many.
        layouts: "contiguous", "channels-last"; or "all".
        dtypes: of the input: "float32", "bfloat16", "float16", "float64".
        device: "cpu" or "cuda"; the processes take the GPUs from the first on.
        batch: N of every shape in each process; 2 by default, but where it belongs to the shape.
        threads: of the CPU in each process; by default PyTorch's, shared between the processes.
        rounds: how often everyone is timed in turn.
        backend: what runs our layers, a name that `batchnorm.explain_backend` lists.
        progress: told what is going on; see `batchnorm.bench.Progress`.

    Returns:
        Times, errors, bytes. After Ctrl-C those of the finished cases, with `interrupted` set.

    Raises:
        InputError: an option is not known, or this machine has no torch.distributed, or too few GPUs.
        WorkerError: a process ended early.
        KeyboardInterrupt: stopped before the first case was finished.

    Example:
        >>> from batchnorm.bench import measure_distributed
        >>> result = measure_distributed(["tiny"], processes=2, rounds=1)  # doctest: +SKIP
        >>> print(result.verdict)  # doctest: +SKIP
    """
    settings = checked(
        suites, layouts, dtypes, device, ("eager",), (), batch, threads, rounds, ("as-is",), backend
    )
    if ":" in device:
        raise InputError(
            message("device", got=repr(device), expected="cpu or cuda: each process has its own GPU")
        )
    if processes < 2:
        raise InputError(message("processes", got=processes, expected="at least 2"))
    settings = replace(settings, batch=settings.batch or _BATCH)
    work, shown = _Work(settings, processes), progress or Silent()

    def result(interrupted: bool) -> Synchronization:
        return Synchronization(
            settings=settings,
            processes=processes,
            machine=work.machine,
            exchanges=tuple(work.found),
            planned=len(work.planned),
            interrupted=interrupted,
        )

    return carried_out(lambda: _run(work, shown), shown, lambda: bool(work.found), result)


class _Work:
    """What is finished so far; it outlives an interruption."""

    def __init__(self, settings: Settings, processes: int) -> None:
        self.settings, self.processes = settings, processes
        self.planned = list(_few(cases(settings)))
        self.machine: dict[str, Any] = {}
        self.found: list[Exchange] = []


def _few(every: Sequence[Case]) -> Iterator[Case]:
    """Of each suite, layout and type some sizes, each once, with all the layers that have it counted."""
    kinds: dict[tuple[str, str, str], dict[tuple[int, ...], Case]] = {}
    for case in every:
        shapes = kinds.setdefault((case.suite, case.layout, case.dtype), {})
        known = shapes.get(case.shape)
        shapes[case.shape] = case if known is None else replace(known, count=known.count + case.count)
    for shapes in kinds.values():
        ordered = sorted(shapes.values(), key=lambda case: -case.elements)
        last = len(ordered) - 1
        kept = {round(place * last / (_SHAPES - 1)) for place in range(_SHAPES)}
        yield from (ordered[place] for place in sorted(kept))


def _run(work: _Work, progress: Progress) -> None:
    progress.start(float(len(work.planned)), len(work.planned), ", ".join(work.settings.suites))
    progress.case_started(f"starting {work.processes} processes")
    with tempfile.TemporaryDirectory() as folder:
        answers = process.work_together(_jobs(work, Path(folder) / "meeting"))
        work.machine = _machine(next(answers, {}), work)
        for case in work.planned:
            label = str(case).partition(", malloc")[0]
            progress.case_started(label)
            answer = next(answers, None)
            if answer is None:
                raise WorkerError("the processes ended before they had answered")
            exchanged = answer.pop("exchanged")
            exchange = Exchange(Record.read(case, answer), exchanged)
            work.found.append(exchange)
            progress.case_finished(label, 1.0, took(exchange))
        for _ in answers:  # to their end, which must be a good one
            pass


def _machine(answer: dict[str, Any], work: _Work) -> dict[str, Any]:
    if "missing" in answer:
        device = work.settings.device
        raise InputError(
            message(
                f"{work.processes} processes with synchronized layers on {device}",
                got=answer["missing"],
                expected="torch.distributed with gloo on a CPU, with NCCL and a GPU for each process on CUDA",
                fix="`batchnorm bench` times the layers in one process.",
            )
        )
    return dict(answer["machine"])


def _jobs(work: _Work, meeting: Path) -> list[dict[str, Any]]:
    settings = work.settings
    return [
        {
            "task": "rank",
            "rank": rank,
            "processes": work.processes,
            "meeting": str(meeting),
            "device": settings.device,
            "threads": settings.threads,
            "rounds": settings.rounds,
            "cases": [vars(case) for case in work.planned],
        }
        for rank in range(work.processes)
    ]
