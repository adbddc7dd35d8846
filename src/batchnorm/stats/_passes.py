"""One pass of a loader through a model, with the input of every batch norm observed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from batchnorm._errors import DataError, ModelError, message
from batchnorm.nn.batch_norm import Extras
from batchnorm.stats._batches import Forward, call, place_of, samples_in
from batchnorm.stats._moments import Moments, Pool, batch_pool
from batchnorm.stats._precision import CHECKED_FROM, precision
from batchnorm.stats._progress import Bar
from batchnorm.stats._ranks import Ranks
from batchnorm.stats._still import Still
from batchnorm.stats._targets import Target

__all__ = ["Job", "Passed", "Statistics", "Stopped", "one_pass", "seen_by"]

Stopped = Literal["tolerance", "samples", "end"]
Statistics = tuple[Tensor, Tensor]  # mean and unbiased variance


@dataclass(frozen=True, eq=False)
class Job:
    """What is run, over what, and until when."""

    model: nn.Module
    targets: tuple[Target, ...]
    loader: Iterable[Any]
    forward: Forward | None
    ranks: Ranks
    samples: int | None
    tolerance: float
    bar: Bar


@dataclass(eq=False)
class Passed:
    """What one pass found: a merged pool a layer, and how it ended."""

    pools: list[Pool]
    precision: list[float]
    effects: list[float]
    samples: int = 0
    rounds: int = 0  # of one batch each on every process
    batches: int = 0
    stopped_by: Stopped = "end"

    @property
    def order(self) -> list[int]:
        """The layers that were reached, in the order of their first calls."""
        reached = [index for index, pool in enumerate(self.pools) if pool.place >= 0]
        return sorted(reached, key=lambda index: self.pools[index].place)

    @property
    def widest(self) -> float:
        """Half the widest confidence interval of a mean, in σ."""
        return max(
            (p for p, pool in zip(self.precision, self.pools, strict=True) if pool.batches), default=0.0
        )


def one_pass(job: Job, still: Still, given: Sequence[Statistics | None], rounds: int | None = None) -> Passed:
    """Run the loader through the model and merge what the layers saw.

    `given` are the statistics that each layer normalizes with; None: each batch's own. With `rounds` the pass ends
    after so many batches of every process, else by the job's rules.
    """
    watch = _Watch(job.targets, still, given)
    handles = [
        target.module.register_forward_pre_hook(watch.hook(index), with_kwargs=True)
        for index, target in enumerate(job.targets)
    ]
    for handle in handles:
        still.keep(handle)
    result = Passed([], [], [])
    batches = _Batches(job)
    check = CHECKED_FROM
    while True:
        active, size, failure = batches.take(watch)
        tally = job.ranks.tally(active, size, failure is not None)
        if failure is not None:
            raise failure
        if tally.failed:
            raise ModelError("recalibrate: another process stopped with an error; the model is as it was")
        if not tally.active:
            break
        result.rounds += 1
        result.batches += tally.active
        result.samples += tally.samples
        job.bar.shown(tally.samples)
        if rounds is not None:
            if result.rounds >= rounds:
                break
        elif job.samples is not None:
            if result.samples >= job.samples:
                result.stopped_by = "samples"
                break
        elif result.rounds >= check:
            check = max(check + 1, check * 5 // 4)
            _merge(job, watch, result)
            if result.widest <= job.tolerance:
                result.stopped_by = "tolerance"
                break
    for handle in handles:
        handle.remove()
    _merge(job, watch, result)
    return result


def _merge(job: Job, watch: "_Watch", result: Passed) -> None:
    merged = job.ranks.merged(watch.pools)
    result.pools = [pool for pool, _, _ in merged]
    judged = [
        precision(pool, scatter, blocks, target.module.eps)
        for (pool, scatter, blocks), target in zip(merged, job.targets, strict=True)
    ]
    result.precision = [width for width, _ in judged]
    result.effects = [effect for _, effect in judged]
    for index in result.order:
        bad = int(result.pools[index].bad)
        if bad >= 0:
            raise DataError(
                message(
                    f"recalibrate: the input of {job.targets[index].name or 'the model'}",
                    got=f"NaN or Inf in call {bad + 1}",
                    expected="finite numbers",
                    fix="Look at that batch. The model is as it was.",
                )
            )


class _Batches:
    """The loader's batches, one at a time, with what goes wrong kept for the exchange between the processes."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.iterator: Iterator[Any] | None = None
        self.ended = False
        self.device = place_of(job.model)

    def take(self, watch: "_Watch") -> tuple[bool, int, BaseException | None]:
        """Run the next batch: whether there was one, its samples, and the exception that it ended in."""
        if self.ended:
            return False, 0, None
        try:
            if self.iterator is None:
                self.iterator = iter(self.job.loader)
            try:
                batch = next(self.iterator)
            except StopIteration:
                self.ended = True
                return False, 0, None
            watch.begin()
            call(self.job.model, batch, self.job.forward, self.device)
            size = samples_in(batch)
            return True, watch.seen if size is None else size, None
        except BaseException as error:  # Ctrl-C too: the other processes must hear of it
            return False, 0, error


class _Watch:
    """The hooks: they see each input, and lend the layer what it is to normalize with."""

    def __init__(self, targets: Sequence[Target], still: Still, given: Sequence[Statistics | None]) -> None:
        self.targets = targets
        self.still = still
        self.given = given
        self.pools = [Pool(target.channels, _device(target)) for target in targets]
        self.reached = 0
        self.seen = 0
        self.called: set[int] = set()
        for target, statistics in zip(targets, given, strict=True):
            mean, var = (target.mean, target.var) if statistics is None else statistics
            still.put(target.module, "running_mean", mean.to(target.mean, copy=True))
            still.put(target.module, "running_var", var.to(target.var, copy=True))

    def begin(self) -> None:
        """Another batch follows."""
        self.seen = 0
        self.called.clear()

    def hook(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """The hook of one layer."""
        target, pool = self.targets[index], self.pools[index]

        def observe(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen = seen_by(layer, target.channels, args, kwargs)
            if seen is None:
                return
            input, mask = seen
            values, samples = batch_pool(input, mask)
            if pool.place < 0:
                pool.place, self.reached = self.reached, self.reached + 1
            pool.repeated = pool.repeated or index in self.called
            self.called.add(index)
            self.seen = max(self.seen, input.shape[0])
            if input.numel():
                pool.add(values, samples)
                if self.given[index] is None:
                    self._lend(layer, values)

        return observe

    def _lend(self, layer: nn.Module, values: Moments) -> None:
        mean, var = layer.running_mean, layer.running_var
        if isinstance(mean, Tensor) and isinstance(var, Tensor):
            mean.copy_(values.mean)
            var.copy_(values.biased_var)


def seen_by(
    layer: nn.Module, channels: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None] | None:
    """Input and mask (N, *S) of a call; None for what does not fit, which is left to the layer to say."""
    input = args[0] if args else kwargs.get("input")
    if not isinstance(input, Tensor) or input.dim() < 2 or input.shape[1] != channels:
        return None
    mask = None
    if isinstance(layer, Extras):
        place = layer._mask_place
        mask = args[place] if len(args) > place else kwargs.get("mask")
    if mask is not None:
        try:
            mask = mask.expand(input.shape[0], *input.shape[2:])
        except (RuntimeError, AttributeError):
            return None
    return input, mask


def _device(target: Target) -> torch.device:
    return torch.device("cpu") if target.mean.device.type == "mps" else target.mean.device
