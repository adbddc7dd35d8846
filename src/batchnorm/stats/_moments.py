"""Count, mean and m2 per channel in float64, and how two of them become one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm import ops

__all__ = ["Moments", "Pool", "batch_pool"]

# A batch is widened to float64 in parts of so many elements: 128 MB.
_PART = 1 << 24
# Batch means are kept for so many blocks of equal length; beyond that two neighbours become one.
BLOCKS = 32


@dataclass(frozen=True, eq=False)
class Moments:
    """Σw (no axis), mean and m2 = Σw(x − mean)², both (C,), all float64."""

    count: Tensor
    mean: Tensor
    m2: Tensor

    @staticmethod
    def none(channels: int, device: torch.device) -> "Moments":
        """Of nothing."""
        zeros = torch.zeros(channels, dtype=torch.float64, device=device)
        return Moments(zeros.new_zeros(()), zeros, zeros)

    def merged(self, other: "Moments") -> "Moments":
        """Of both together, by Chan, Golub and LeVeque: what lies between the two means counts as variance."""
        count = self.count + other.count
        share = other.count / torch.where(count > 0, count, 1.0)
        delta = other.mean - self.mean
        return Moments(
            count, self.mean + share * delta, self.m2 + other.m2 + self.count * share * delta.square()
        )

    @property
    def var(self) -> Tensor:
        """The unbiased variance m2 / (count − 1), which is what PyTorch's layers store."""
        return self.m2 / (self.count - 1)

    @property
    def biased_var(self) -> Tensor:
        """m2 / count, which is what a batch is normalized by."""
        return self.m2 / torch.where(self.count > 0, self.count, 1.0)


def _of_rows(weights: Tensor, rows: Tensor) -> Moments:
    """Moments over rows (N, C), each with a weight (N,)."""
    count = weights.sum()
    w = weights.unsqueeze(1)
    scale = torch.where(count > 0, count, 1.0)
    mean = (w * rows).sum(0) / scale
    mean = mean + (w * (rows - mean)).sum(0) / scale
    return Moments(count, mean, (w * (rows - mean).square()).sum(0))


class Pool:
    """What is known of a layer's inputs: their moments, and how far samples and stretches of the stream differ.

    Positions of one sample are alike, so the precision of the mean is that of a mean of samples, each of them a
    weighted value (its own mean, its number of positions), and is further limited by how much one stretch of the
    stream differs from the next.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        nothing = Moments.none(channels, device)
        self.values = nothing
        self.samples = nothing  # sample means, each with its weight squared
        self.batches = 0  # calls
        self.blocks: list[Moments] = []
        self.length = 1  # calls a block
        self.bad = torch.full((), -1, dtype=torch.int64, device=device)  # the first call with NaN or Inf
        self.place = -1  # how many other layers were called before it
        self.repeated = False  # called several times in one batch

    def add(self, values: Moments, samples: Moments) -> None:
        """Take in one call."""
        finite = (values.mean.isfinite() & values.m2.isfinite()).all()
        self.bad = torch.where((self.bad < 0) & ~finite, self.batches, self.bad)
        self.values = self.values.merged(values)
        self.samples = self.samples.merged(samples)
        if self.batches % self.length == 0:
            if len(self.blocks) == BLOCKS:
                pairs = zip(self.blocks[::2], self.blocks[1::2], strict=True)
                self.blocks = [first.merged(second) for first, second in pairs]
                self.length *= 2
            self.blocks.append(values)
        else:
            self.blocks[-1] = self.blocks[-1].merged(values)
        self.batches += 1


def batch_pool(input: Tensor, mask: Tensor | None) -> tuple[Moments, Moments]:
    """Moments of one input (N, C, *S), and of its sample means weighted by the square of their weights.

    `mask` is (N, *S), weights or bool.
    """
    x = input.detach()
    if x.device.type == "mps":  # it has no float64
        x, mask = x.cpu(), None if mask is None else mask.cpu()
    n, channels = x.shape[:2]
    # A batch is widened to float64, where the kernels do not do it on their way, in parts of so many samples.
    rows = max(1, _PART // max(1, channels * x.shape[2:].numel()))
    weights, means, m2 = [], [], torch.zeros(channels, dtype=torch.float64, device=x.device)
    for start in range(0, n, rows):
        part = x[start : start + rows]
        mean, rest, weight = ops.moments(
            part, None if mask is None else mask[start : start + rows], part.shape[0]
        )
        weights.append(weight.flatten())
        means.append(mean)
        m2 = m2 + rest.sum(0)
    if not means:
        nothing = Moments.none(channels, x.device)
        return nothing, nothing
    weight, mean = torch.cat(weights), torch.cat(means)
    between = _of_rows(weight, mean)
    samples = _of_rows(weight.square(), mean)
    return Moments(between.count, between.mean, between.m2 + m2), samples
