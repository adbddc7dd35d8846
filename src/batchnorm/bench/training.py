"""`measure_steps`: whole training steps of a network, with batch norm as it is, fused, and taken out."""

from collections.abc import Sequence
from itertools import product
from typing import Any

from batchnorm._errors import InputError, message
from batchnorm.bench import process
from batchnorm.bench.asking import ask_machine
from batchnorm.bench.plan import LAYOUTS, check_common, known
from batchnorm.bench.process import WorkerError
from batchnorm.bench.progress import Progress, Silent, carried_out
from batchnorm.bench.record import GRAPH, LAUNCHED
from batchnorm.bench.training_steps import StepCase, StepRecord, StepSettings, TrainingSteps
from batchnorm.bench.wording import seconds

__all__ = ["measure_steps"]

_DTYPES = ("float32", "bfloat16", "float16")
_BATCH = {"cpu": 8, "cuda": 128}


def measure_steps(
    network: str = "resnet50",
    *,
    layouts: Sequence[str] = ("channels-last",),
    dtypes: Sequence[str] = ("float32",),
    device: str = "cpu",
    batch: int | None = None,
    image: int = 224,
    threads: int | None = None,
    rounds: int = 10,
    backend: str | None = None,
    progress: Progress | None = None,
) -> TrainingSteps:
    """Time whole training steps (forward, backward, SGD) of a network, `fuse`d, as it is, and without batch norm.

    All three are timed in turn in one process. On a GPU they are timed twice: launched by the host, as a training loop
    does, and replayed as one CUDA graph, which leaves the kernels' time alone. Images and labels are random. The fused
    network's first output must be that of the network as it is, or it gets no time.

    Args:
        network: "resnet18", "resnet50", or a name of torchvision.models, for which torchvision must be installed.
        layouts: "contiguous", "channels-last"; or "all".
        dtypes: "float32"; "bfloat16" and "float16" mean autocast, without a scaler of gradients.
        device: "cpu", "cuda" or "cuda:N".
        batch: images in a step; by default 8 on a CPU and 128 on a GPU.
        image: their side in pixels.
        threads: of the CPU; by default PyTorch's.
        rounds: how often everyone is timed in turn.
        backend: what runs the fused layers, a name that `batchnorm.explain_backend` lists; None or "auto" for the usual
            choice.
        progress: told of each round; see `batchnorm.bench.Progress`.

    Returns:
        Times, peak memory on a GPU, ratios. After Ctrl-C those of the finished rounds, with `interrupted` set.

    Raises:
        InputError: an option is not known, the device does not answer, or there is no such network.
        BackendError: the backend cannot run on the device.
        KeyboardInterrupt: stopped before the first round was finished.

    Example:
        >>> from batchnorm.bench import measure_steps
        >>> result = measure_steps("resnet18", batch=2, image=64, rounds=2)  # doctest: +SKIP
        >>> print(result.verdict)  # doctest: +SKIP
    """
    backend = check_common(device, batch, threads, rounds, backend)
    if image < 32:
        raise InputError(message("image", got=image, expected="at least 32 pixels"))
    kind = "cpu" if device == "cpu" else "cuda"
    settings = StepSettings(
        network=network,
        layouts=known("layout", layouts, LAYOUTS, every=LAYOUTS),
        dtypes=known("dtype", dtypes, _DTYPES),
        device=device,
        batch=batch or _BATCH[kind],
        image=image,
        threads=threads,
        rounds=rounds,
        backend=backend,
    )
    work, shown = _Work(settings), progress or Silent()

    def result(interrupted: bool) -> TrainingSteps:
        return TrainingSteps(
            settings=settings,
            machine=work.machine,
            records=tuple(record for record in work.records if record.rounds or record.failure),
            planned=len(work.planned),
            interrupted=interrupted,
        )

    return carried_out(
        lambda: _run(work, shown), shown, lambda: any(record.rounds for record in work.records), result
    )


class _Work:
    """What is finished so far; it outlives an interruption."""

    def __init__(self, settings: StepSettings) -> None:
        self.settings = settings
        modes = (LAUNCHED,) if settings.device == "cpu" else (LAUNCHED, GRAPH)
        self.planned = [
            StepCase(layout, dtype, mode)
            for layout, dtype, mode in product(settings.layouts, settings.dtypes, modes)
        ]
        self.machine: dict[str, Any] = {}
        self.records: list[StepRecord] = []


def _run(work: _Work, progress: Progress) -> None:
    settings = work.settings
    total = len(work.planned) * settings.rounds
    progress.start(float(total), total, f"training steps of {settings.network}")
    progress.case_started("this machine")
    answer = ask_machine(settings.device, settings.dtypes, settings.backend, settings.threads, copy=False)
    work.machine = dict(answer["machine"])
    for case in work.planned:
        progress.case_started(f"{case}: making the networks")
        record = StepRecord(case)
        work.records.append(record)
        try:
            _measure(record, settings, progress)
        except WorkerError as error:
            record.failure = record.failure or str(error)
        if record.failure:
            progress.case_finished(str(case), float(settings.rounds), f"failed: {record.failure}")


def _measure(record: StepRecord, settings: StepSettings, progress: Progress) -> None:
    job = {
        "task": "steps",
        "device": settings.device,
        "threads": settings.threads,
        "network": settings.network,
        "batch": settings.batch,
        "image": settings.image,
        "rounds": settings.rounds,
        "backend": settings.backend,
        **vars(record.case),
    }
    for answer in process.work(job):
        if "refused" in answer:
            raise InputError(answer["refused"])
        if "setup" in answer:
            record.note(answer["setup"])
            continue
        record.rounds.append(answer["seconds"])
        label = f"{record.case}, round {len(record.rounds)}"
        told = ", ".join(f"{seconds(value)} {name}" for name, value in answer["seconds"].items())
        progress.case_finished(label, 1.0, told)
        progress.case_started(label)
