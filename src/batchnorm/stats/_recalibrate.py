"""`recalibrate`: the running statistics of a network, renewed from data."""

import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from batchnorm._errors import DataError, InputError, InputTypeError, message
from batchnorm._files import Interrupts
from batchnorm._walk import Skipped
from batchnorm.stats._batches import Forward, check_loader
from batchnorm.stats._notes import notes
from batchnorm.stats._passes import Job, Passed, Statistics, one_pass
from batchnorm.stats._progress import Bar
from batchnorm.stats._ranks import ranks_of
from batchnorm.stats._recalibration import RecalibratedLayer, Recalibration
from batchnorm.stats._sequential import in_turn, statistics_of
from batchnorm.stats._still import Still, plainly
from batchnorm.stats._targets import Target, bare, targets

__all__ = ["recalibrate"]

Mode = Literal["joint", "sequential"]
MODES = ("joint", "sequential")


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    samples: int | None = None,
    tolerance: float = 0.01,
    forward: Forward | None = None,
    group: Any | Literal[False] | None = None,
    mode: Mode = "joint",
) -> Recalibration:
    r"""Set the running statistics of every batch norm to the mean and variance of its inputs over a data set.

    $$\mu = \frac1n \sum_i x_i, \qquad \sigma^2 = \frac1{n-1} \sum_i (x_i - \mu)^2$$

    per channel, over all samples and positions of all batches, in float64. What lies between the means of two batches
    counts as variance (Chan's merge), so neither the order nor the size of the batches matters. The variance is the
    unbiased one, as PyTorch stores it. Use it after averaging weights (SWA, EMA), after merging or pruning, where
    batches were small, where a bad batch has poisoned the statistics, and on data of another origin than the training
    data; labels are not needed.

    The layers are PyTorch's 1d, 2d, 3d and synchronized batch norms and this package's; one that is called with a
    mask counts what the mask holds. Left alone are frozen layers: those in eval mode while the model is in training
    mode, with `momentum=0.0`, or with `track_running_stats=False`; and layers that no batch reaches. While it runs,
    every module is in eval mode: no dropout. At the end only running_mean, running_var and num_batches_tracked of the
    layers differ; after an error or Ctrl-C nothing does. num_batches_tracked becomes the number of batches that went
    into the statistics, so that training with `momentum=None` goes on averaging with the right weight.

    The two modes differ in what the deeper layers see, which depends on how the earlier ones normalize:

    - "joint", one pass: each layer normalizes with its batch's own statistics, as in training. Exact for the layers
      that no other batch norm stands before; the others see inputs that are off by as much as batch statistics
      scatter: with shuffled batches of 64 by 0.003 σ, of 8 by 0.03 σ, with batches of one class each by 0.1 σ.
    - "sequential", about as many passes as batch norms follow one another: each layer's statistics are taken with all
      earlier layers already renewed and in eval mode, so they are exactly those of what the network sees in use. The
      loader is gone through several times and should give the same data each time. Use it where batches are small or
      sorted.

    The pass ends early when the 95 % confidence interval of every channel's mean is within ± `tolerance` of the
    channel's σ = √(var + ε), the data taken as a random sample. Positions of one image are alike, so the interval is
    that of a mean of samples, not of pixels; and it is widened by how much one stretch of the stream differs from
    the next, which keeps it from ending early in a sorted stream once a second class has been seen. What has not been
    seen at all no rule can know: with a sorted stream give `tolerance=0`.

    Args:
        model: the network. Inside DataParallel, DistributedDataParallel or torch.compile it is found by itself.
        loader: gives batches: a tensor, the input; a tuple or list, **whose first element is the input**, the others
            are ignored; or a dict, of which the model gets what its forward has a name for. Tensors are moved to the
            model's device.
        samples: stop with the batch that reaches this number, over all processes, and by no other rule.
        tolerance: in σ; 0 for the whole loader.
        forward: `forward(model, batch)` runs the model on any other kind of batch, or in another way.
        group: processes that each have a share of the data, however uneven; all of them must call, and all get the
            same statistics. None: the default group where torch.distributed is initialized; False: this process alone.
        mode: "joint" or "sequential".

    Returns:
        Recalibration: per layer the statistics before and after; samples, what ended the pass, `revert()`.

    Raises:
        ModelError: no batch norm to renew, a lazy one that has not seen its shape, a scripted or sharded model, or
            another process failed.
        DataError: no batches, a batch of unknown kind, NaN or Inf in a layer's input, one value a channel.
        InputError: an option out of range.
        InputTypeError: `model` is no module, `loader` gives no batches.

    Source:
        Wu and Johnson, Rethinking "Batch" in BatchNorm, 2021, arXiv:2105.07576, section 3; Chan, Golub and LeVeque,
        Updating formulae and a pairwise algorithm for computing sample variances, 1979.

    Example:
        >>> import torch, batchnorm
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2), nn.BatchNorm1d(2))
        >>> x = torch.randn(256, 3) * 5
        >>> print(batchnorm.recalibrate(net, x.split(64), mode="sequential"))
        recalibrated 2 layers (sequential, 2 passes) on 256 samples: the loader ended; means known to ±0.12 σ
          layer  mean moved, σ  std became, ×  mean known to ±, σ
          1              0.266            2.9               0.122
          4               1.28          0.274               0.122
        >>> y = net[0](x)
        >>> torch.allclose(net[1].running_mean, y.mean(0), atol=1e-5), torch.allclose(net[1].running_var, y.var(0))
        (True, True)
    """
    network = bare(model, "recalibrate")
    _check_options(samples, tolerance, forward, mode)
    check_loader(loader, "recalibrate", again=mode == "sequential")
    found, skipped = targets(network, "recalibrate")
    ranks = ranks_of(group)
    ranks.agree(_fingerprint(found, samples, tolerance, mode))
    with (
        Bar("recalibrate", loader, visible=ranks.rank == 0) as bar,
        Still(network) as still,
        plainly(grad=False),
    ):
        job = Job(network, found, loader, forward, ranks, samples, tolerance, bar)
        passed = one_pass(job, still, [None] * len(found))
        _check_enough(passed, found)
        passes = 1
        unsettled: list[int] = []
        new = [statistics_of(pool) for pool in passed.pools]
        if mode == "sequential":
            new, passes, unsettled = in_turn(job, still, passed)
    reached = set(passed.order)
    told = notes(passed, found, mode, unsettled)
    skipped += tuple(
        Skipped(target.name, "no batch reached it", target.also)
        for index, target in enumerate(found)
        if index not in reached
    )
    order = [index for index in range(len(found)) if index in reached]
    before = _write(found, new, passed, order)
    return Recalibration(
        layers=tuple(
            _layer(found[index], old[1:3], passed, index) for index, old in zip(order, before, strict=True)
        ),
        skipped=skipped,
        samples=passed.samples,
        batches=passed.batches,
        stopped_by=passed.stopped_by,
        passes=passes,
        mode=mode,
        tolerance=tolerance,
        notes=told,
        _before=before,
    )


def _check_options(samples: int | None, tolerance: float, forward: Forward | None, mode: str) -> None:
    if mode not in MODES:
        raise InputError(message("mode", got=repr(mode), expected="'joint' or 'sequential'"))
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int)):
        raise InputTypeError(
            message("samples", got=type(samples).__name__, expected="a whole number or None")
        )
    if samples is not None and samples < 2:
        raise InputError(
            message("samples", got=samples, expected="at least 2", fix="Some thousand are usual.")
        )
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float):
        raise InputTypeError(message("tolerance", got=type(tolerance).__name__, expected="a number"))
    if not 0 <= tolerance < math.inf:
        raise InputError(message("tolerance", got=tolerance, expected="a number ≥ 0, in units of σ"))
    if forward is not None and not callable(forward):
        raise InputTypeError(
            message("forward", got=type(forward).__name__, expected="a function of the model and a batch")
        )


def _fingerprint(found: Sequence[Target], samples: int | None, tolerance: float, mode: str) -> int:
    layers = [(target.name, target.channels) for target in found]
    return zlib.crc32(repr((layers, samples, tolerance, mode)).encode())


def _check_enough(passed: Passed, found: Sequence[Target]) -> None:
    """Refuse what no statistics can be had from."""
    if not passed.rounds:
        raise DataError(message("recalibrate: loader", got="no batch", expected="at least one"))
    if not passed.order:
        raise DataError(
            message(
                "recalibrate",
                got="no call of any batch norm",
                expected="batches that pass through them",
                fix="If only a part of the model runs, give that part.",
            )
        )
    for index in passed.order:
        count = float(passed.pools[index].values.count)
        if not count > 1:
            raise DataError(
                message(
                    f"recalibrate: the input of {found[index].name or 'the model'}",
                    got=f"{count:g} values a channel",
                    expected="more than one",
                    fix="A variance needs two: give more data.",
                )
            )


def _write(
    found: Sequence[Target], new: Sequence[Statistics], passed: Passed, order: Sequence[int]
) -> tuple[tuple[Target, Tensor, Tensor, Tensor | None], ...]:
    """Set the buffers of the layers, all or none, and return what they held."""
    before = tuple(
        (target, target.mean.clone(), target.var.clone(), None if counter is None else counter.clone())
        for target in (found[index] for index in order)
        for counter in (target.counter,)
    )
    with Interrupts() as interrupts, torch.no_grad():
        interrupts.hold()
        for index in order:
            target, (mean, var) = found[index], new[index]
            target.mean.copy_(mean)
            target.var.copy_(var)
            if target.counter is not None:
                target.counter.fill_(passed.pools[index].batches)
        if interrupts.pressed:
            for target, mean, var, counter in before:
                target.mean.copy_(mean)
                target.var.copy_(var)
                if target.counter is not None and counter is not None:
                    target.counter.copy_(counter)
    if interrupts.pressed:
        raise KeyboardInterrupt
    return before


def _layer(target: Target, before: Sequence[Tensor], passed: Passed, index: int) -> RecalibratedLayer:
    mean_before, var_before, mean, var = (
        tensor.detach().to("cpu", copy=True).double() for tensor in (*before, target.mean, target.var)
    )
    return RecalibratedLayer(
        name=target.name,
        also=target.also,
        count=float(passed.pools[index].values.count),
        mean_before=mean_before,
        var_before=var_before,
        mean=mean,
        var=var,
        eps=target.module.eps,
        precision=passed.precision[index],
        design_effect=passed.effects[index],
    )
