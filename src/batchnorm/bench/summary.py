"""What many cases say together: mean ratios, the worst shape, the share of what the memory can do."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from batchnorm.bench.case import MEMORY, OPERATIONS, counted_tensors
from batchnorm.bench.record import OURS, Record
from batchnorm.bench.statistics import geometric_mean
from batchnorm.bench.suites import EPILOGUES

__all__ = ["ANY", "LARGE", "Group", "Total", "groups", "totals"]

# Every epilogue together, each shape with what follows it.
ANY = "all"
# Bytes of one tensor above which a group of its own is made: beyond most caches; beyond what glibc ever keeps.
LARGE = (16_000_000, 32_000_000)


@dataclass(frozen=True)
class Group:
    """The shapes of a suite in one layout and type, for one operation, epilogue and state of the memory.

    Args:
        suite, layout, dtype, operation, epilogue, memory, rival: what it is about; the epilogue may be "all".
        larger_than: bytes that a tensor of every shape in it exceeds.
        shapes: how many.
        norms: how many batch norms of the network have them.
        ratio: geometric mean over those batch norms of the rival's time over ours.
        worst: the smallest ratio.
        worst_shape: where that was.
        share: geometric mean over the batch norms of the time that the counted bytes take at the speed of a copy, over
            our time.
        rival_share: the same for the rival.
        seconds: our median times summed over the batch norms.
        rival_seconds: the rival's.
        faults: the most pages of new memory that one of our calls got; None where unknown.
    """

    suite: str
    layout: str
    dtype: str
    operation: str
    epilogue: str
    memory: str
    rival: str
    larger_than: int
    shapes: int
    norms: int
    ratio: float
    worst: float
    worst_shape: str
    share: float
    rival_share: float
    seconds: float
    rival_seconds: float
    faults: float | None


@dataclass(frozen=True)
class Total:
    """What the batch norms of a network take together: medians, each as often as its shape occurs.

    Args:
        suite, layout, dtype, operation, epilogue, memory: what it is about; the epilogue is "all" where each shape has
            what follows it in the network.
        norms: how many batch norms were timed.
        counted: bytes that they have to move, by the count of `counted_tensors`.
        seconds: by who took them; None for one that lacks a shape.
    """

    suite: str
    layout: str
    dtype: str
    operation: str
    epilogue: str
    memory: str
    norms: int
    counted: int
    seconds: Mapping[str, float | None]


def totals(records: Sequence[Record], epilogues: Sequence[str], against: Sequence[str]) -> tuple[Total, ...]:
    """The sums of each suite, layout, type, state of the memory and operation; for each of `epilogues`, if any."""
    kinds = dict.fromkeys((r.case.suite, r.case.layout, r.case.dtype, r.case.memory) for r in records)
    found = []
    for kind, operation, epilogue in product(kinds, OPERATIONS, epilogues or (ANY,)):
        members = [
            r
            for r in records
            if (r.case.suite, r.case.layout, r.case.dtype, r.case.memory) == kind
            and epilogue in (ANY, r.case.epilogue)
            and operation in r.times
        ]
        if members:
            suite, layout, dtype, memory = kind
            found.append(
                Total(
                    suite,
                    layout,
                    dtype,
                    operation,
                    epilogue,
                    memory,
                    sum(r.case.count for r in members),
                    sum(
                        r.case.count * r.case.bytes * counted_tensors(operation, r.case.epilogue)
                        for r in members
                    ),
                    {name: _together(members, operation, name) for name in (OURS, *against)},
                )
            )
    return tuple(found)


def _together(records: Sequence[Record], operation: str, contender: str) -> float | None:
    if any(contender not in r.times[operation] for r in records):
        return None
    return sum(r.case.count * r.times[operation][contender].p50 for r in records)


def groups(records: Sequence[Record], copy: float) -> tuple[Group, ...]:
    """Every group that has a shape in it; those of large tensors for training steps alone."""
    kinds = list(dict.fromkeys((r.case.suite, r.case.layout, r.case.dtype) for r in records))
    rivals = list(dict.fromkeys(name for r in records for times in r.times.values() for name in times))
    found: list[Group] = []
    for kind, rival, operation in product(kinds, rivals, OPERATIONS):
        if rival == OURS:
            continue
        members = [
            r
            for r in records
            if (r.case.suite, r.case.layout, r.case.dtype) == kind and r.ratio(operation, rival) is not None
        ]
        for limit in (0, *LARGE) if operation == "forward+backward" else (0,):
            found += _of_kind(members, operation, rival, limit, copy)
    return tuple(found)


def _of_kind(
    records: Sequence[Record], operation: str, rival: str, limit: int, copy: float
) -> Iterator[Group]:
    for epilogue, memory in product((*EPILOGUES, ANY), MEMORY):
        members = [
            r
            for r in records
            if r.case.memory == memory and r.case.epilogue in (epilogue, *_every(epilogue))
            if r.case.bytes > limit
        ]
        # One epilogue alone needs no second line that says the same.
        if members and not (epilogue == ANY and len({r.case.epilogue for r in members}) == 1):
            yield _group(members, operation, rival, epilogue, limit, copy)


def _every(epilogue: str) -> tuple[str, ...]:
    return tuple(EPILOGUES) if epilogue == ANY else ()


def _group(
    records: Sequence[Record], operation: str, rival: str, epilogue: str, limit: int, copy: float
) -> Group:
    case = records[0].case
    ratios = [(r.ratio(operation, rival) or 0.0, r) for r in records]
    worst, where = min(ratios, key=lambda pair: pair[0])
    faults = [r.times[operation][OURS].faults for r in records]

    def mean_share(contender: str) -> float:
        return geometric_mean(((r.speed(operation, contender) or 0.0) / copy, r.case.count) for r in records)

    def seconds(contender: str) -> float:
        return sum(r.case.count * r.times[operation][contender].p50 for r in records)

    return Group(
        suite=case.suite,
        layout=case.layout,
        dtype=case.dtype,
        operation=operation,
        epilogue=epilogue,
        memory=case.memory,
        rival=rival,
        larger_than=limit,
        shapes=len(records),
        norms=sum(r.case.count for r in records),
        ratio=geometric_mean((ratio, r.case.count) for ratio, r in ratios),
        worst=worst,
        worst_shape=where.case.label,
        share=mean_share(OURS),
        rival_share=mean_share(rival),
        seconds=seconds(OURS),
        rival_seconds=seconds(rival),
        faults=max((count for count in faults if count is not None), default=None),
    )
