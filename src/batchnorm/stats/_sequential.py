"""Layer after layer, each with all earlier ones renewed: the statistics of what the network sees in use."""

from torch import Tensor

from batchnorm.stats._moments import Pool
from batchnorm.stats._passes import Job, Passed, Statistics, one_pass
from batchnorm.stats._still import Still

__all__ = ["in_turn", "statistics_of"]

# In σ: what float32 activations are known to anyway.
_SAME = 1e-5
# A layer that feeds itself has no statistics that can be taken once: so many passes may look for its fixed point.
_TRIES = 20


def statistics_of(pool: Pool) -> Statistics:
    """Mean and unbiased variance."""
    return pool.values.mean, pool.values.var


def in_turn(job: Job, still: Still, passed: Passed) -> tuple[list[Statistics], int, list[int]]:
    """Statistics, number of passes, and the layers that did not settle; `passed` is the first pass.

    In every pass the layers are looked at in the order of execution. The first whose statistics are not final gets
    them now: everything before it was final while its input was made. So does the next one, if the first had
    been normalizing with these very statistics already, and so on: layers that do not depend on each other share
    passes, without anyone knowing the graph. Before they are final, a layer's own statistics are trusted if it is the
    next in turn or if two passes found the same; the others normalize with each batch's, so that nothing runs away.
    """
    eps = [target.module.eps for target in job.targets]
    now = [statistics_of(pool) for pool in passed.pools]
    before: list[Statistics] | None = None
    given: list[Statistics | None] = [None] * len(now)
    final: list[Statistics | None] = [None] * len(now)
    tries = [0] * len(now)
    unsettled: list[int] = []
    passes, rounds, order = 1, passed.rounds, passed.order
    while True:
        trusted: set[int] = set()
        for index in order:
            if final[index] is not None:
                continue
            own = given[index]
            settled = own is not None and _same(own, now[index], eps[index])
            if passed.pools[index].repeated and not settled:
                tries[index] += 1
                if tries[index] <= _TRIES:
                    trusted.add(index)
                    break
                unsettled.append(index)
            final[index] = now[index]
            if not settled:
                break
        left = [index for index in order if final[index] is None]
        if not left:
            return (
                [known or statistics for known, statistics in zip(final, now, strict=True)],
                passes,
                unsettled,
            )
        trusted.add(left[0])
        given = [
            known
            if known is not None
            else now[index]
            if index in trusted or (before is not None and _same(before[index], now[index], eps[index]))
            else None
            for index, known in enumerate(final)
        ]
        before = now
        passes += 1
        job.bar.begin(passes)
        passed = one_pass(job, still, given, rounds)
        now = [statistics_of(pool) for pool in passed.pools]


def _same(first: Statistics, second: Statistics, eps: float) -> bool:
    unit: Tensor = (second[1] + eps).sqrt()
    moved = (first[0] - second[0]).abs() / unit
    stretched = ((first[1] + eps).sqrt() / unit - 1).abs()
    return bool(((moved <= _SAME) & (stretched <= _SAME)).all())
