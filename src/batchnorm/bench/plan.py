"""The options of a benchmark, checked, and the cases that they ask for."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from batchnorm._errors import InputError, message
from batchnorm.bench.case import MEMORY, SIZES, Case
from batchnorm.bench.process import memory_states
from batchnorm.bench.suites import EPILOGUES, SUITES, Norm, Suite

__all__ = [
    "AUTO",
    "BACKENDS",
    "LAYOUTS",
    "RIVALS",
    "Settings",
    "cases",
    "check_common",
    "checked",
    "known",
]

LAYOUTS = ("contiguous", "channels-last")
RIVALS = ("eager", "compile", "cudnn")
# Of `ops`, which is not asked, because it would import PyTorch into the process that plans.
BACKENDS = ("cpu", "triton", "aten", "reference")
AUTO = "auto"
# What `--epilogue all` measures on every shape.
_ALL = ("none", "relu", "residual+relu")
DEFAULT_SUITES = ("resnet50", "tiny")


@dataclass(frozen=True)
class Settings:
    """What was asked for.

    Args:
        suites: names of `SUITES`.
        layouts: "contiguous", "channels-last"; 2-D input has one layout, "rows", and is measured once.
        dtypes: of the input.
        device: where it runs.
        against: whom our layer is compared with.
        epilogues: what follows the layer; empty for what follows it in the network.
        batch: N of every shape; None for the suites' own.
        threads: of the CPU; None for PyTorch's default.
        rounds: how often everyone is timed in turn.
        memory: how the processes get their memory.
        backend: what runs our layer; None for the usual choice.
    """

    suites: tuple[str, ...] = DEFAULT_SUITES
    layouts: tuple[str, ...] = LAYOUTS
    dtypes: tuple[str, ...] = ("float32",)
    device: str = "cpu"
    against: tuple[str, ...] = ("eager",)
    epilogues: tuple[str, ...] = ()
    batch: int | None = None
    threads: int | None = None
    rounds: int = 5
    memory: tuple[str, ...] = MEMORY
    backend: str | None = None


def checked(
    suites: Sequence[str],
    layouts: Sequence[str],
    dtypes: Sequence[str],
    device: str,
    against: Sequence[str],
    epilogues: Sequence[str],
    batch: int | None,
    threads: int | None,
    rounds: int,
    memory: Sequence[str],
    backend: str | None = None,
) -> Settings:
    """The options as settings.

    Raises:
        InputError: one is not known or out of range.
    """
    backend = check_common(device, batch, threads, rounds, backend)
    possible = memory_states(device)
    wanted = known("memory", memory, MEMORY)
    return Settings(
        suites=known("suite", suites, tuple(SUITES), every=tuple(SUITES)),
        layouts=known("layout", layouts, LAYOUTS, every=LAYOUTS),
        dtypes=known("dtype", dtypes, tuple(SIZES)),
        device=device,
        against=known("against", against, RIVALS),
        epilogues=() if tuple(epilogues) in ((), ("network",)) else _epilogues(epilogues),
        batch=batch,
        threads=threads,
        rounds=rounds,
        memory=tuple(state for state in wanted if state in possible) or possible[:1],
        backend=backend,
    )


def check_common(
    device: str, batch: int | None, threads: int | None, rounds: int, backend: str | None
) -> str | None:
    """Refuse what no benchmark takes, and give the backend's name; None for the usual choice.

    Raises:
        InputError: one is not known or out of range.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise InputError(message("device", got=repr(device), expected="cpu, cuda or cuda:N"))
    for name, number, least in (("batch", batch, 2), ("threads", threads, 1), ("rounds", rounds, 1)):
        if number is not None and number < least:
            raise InputError(message(name, got=number, expected=f"at least {least}"))
    if backend is None or backend == AUTO:
        return None
    return known("backend", (backend,), (*BACKENDS, AUTO))[0]


def _epilogues(names: Sequence[str]) -> tuple[str, ...]:
    return known("epilogue", names, tuple(EPILOGUES), every=_ALL, more=("network",))


def known(
    what: str,
    names: Sequence[str],
    known: tuple[str, ...],
    every: tuple[str, ...] = (),
    more: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """The names without repetitions; "all" stands for `every` where there is such a set."""
    names = (names,) if isinstance(names, str) else tuple(names)
    if every and tuple(names) == ("all",):
        return every
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        choices = ", ".join((*known, *more, *(("all",) if every else ())))
        raise InputError(message(what, got=repr(unknown[0]) if unknown else "none", expected=f"of {choices}"))
    return tuple(dict.fromkeys(names))


def cases(settings: Settings) -> list[Case]:
    """Every case of every suite, in order; the two states of the memory stand side by side."""
    return [
        case
        for name in settings.suites
        for layout in settings.layouts
        for dtype in settings.dtypes
        for case in _of_suite(SUITES[name], layout, dtype, settings)
    ]


def _of_suite(suite: Suite, layout: str, dtype: str, settings: Settings) -> Iterator[Case]:
    batch = settings.batch or (suite.cpu_batch if settings.device == "cpu" else suite.cuda_batch)
    for norm in _norms(suite, settings.epilogues):
        if not norm.size and layout != settings.layouts[0]:
            continue
        for memory in settings.memory:
            yield Case(
                suite=suite.name,
                shape=norm.shape(batch),
                count=norm.count,
                epilogue=norm.epilogue,
                layout=layout if norm.size else "rows",
                dtype=dtype,
                device=settings.device,
                threads=settings.threads or suite.threads,
                memory=memory,
                backend=settings.backend,
            )


def _norms(suite: Suite, epilogues: tuple[str, ...]) -> Iterator[Norm]:
    if not epilogues:
        yield from suite.norms
        return
    counts: Counter[tuple[int, tuple[int, ...], int | None]] = Counter()
    for norm in suite.norms:
        counts[norm.channels, norm.size, norm.batch] += norm.count
    for (channels, size, batch), count in counts.items():
        for epilogue in epilogues:
            yield Norm(channels, size, epilogue, count, batch)
