"""Statistics over all processes of a group: one exchange of a few numbers a channel forward, and one backward."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm._errors import InputError, message
from batchnorm.ops import Policy, Statistics, demand, is_free, merged

__all__ = ["GATHER_AT_MOST", "Running", "Synced"]

# Up to so many processes each gets the numbers of all, 16 bytes a channel and process, and merges them: 1 MB for 1024
# channels and 64 processes. With more of them sums about a pivot are exchanged, whose size does not depend on how many.
GATHER_AT_MOST = 64

# running_mean and running_var of the layer.
Running = tuple[Tensor | None, Tensor | None]

_DIFFER = message(
    "SyncBatchNorm",
    got="running means that differ between the processes",
    expected="the same on all: they are the pivot of the sums",
    fix="Load the same checkpoint everywhere, or let DistributedDataParallel broadcast the buffers.",
)


class Synced(Policy):
    """The statistics of all processes' batches together; each process's part counts as much as it holds.

    The exchange is in float64. Up to `GATHER_AT_MOST` processes it is of mean, m2 and count, which are merged by
    Chan's formula in the order of the ranks. Above, it is one sum of

        n,   S₁ = n·(mean − p),   S₂ = m2 + n·(mean − p)²

    about a pivot p: mean = p + S₁/n and m2 = S₂ − S₁²/n. Both terms of the difference carry a rounding error of about
    ε·n·(mean − p)², ε = 2.2e-16, so the variance has a relative error of about ε·(1 + ((mean − p)/σ)²). Without a pivot
    that is 2e-8 at a mean of 10⁴ σ. p is the running mean, from which the mean is a fraction of σ away once the
    running statistics have settled, and then the error is that of one rounding. In the first steps p is still near 0:
    with a momentum of 0.1 the distance shrinks by 0.9 a step.

    p must be the same everywhere. Each process adds h, 20 bits of a hash of its pivot, and h² to the sum: W·Σh² = (Σh)²
    if and only if all h are equal. Σh and Σh² are integers below 2⁵³ for up to 8,192 processes, so exact. Of W·Σh² and
    (Σh)² each is rounded once; for equal h they are the same integer and stay equal, and for up to 4,096 processes the
    least difference, W − 1, is more than the rounding of W²·2⁴⁰ hides.
    """

    local = False

    def __init__(self, group: Any, running: Running, single: str) -> None:
        self._group = group
        self._running = running
        self._single = single
        self._shape = torch.Size()
        # Whether the running statistics serve as constants, because there is one value per channel in all.
        self._constant: Tensor | None = None

    @property
    def group(self) -> str:
        """The name of the group, by which traced code finds it."""
        group: Any = dist.group.WORLD if self._group is None else self._group
        return str(group.group_name)

    def parts(self, shape: torch.Size) -> tuple[tuple[int, int], ...]:
        """One; how much the input holds, with what a mask hides, is kept."""
        self._shape = shape
        return super().parts(shape)

    def statistics(self, mean: Tensor, m2: Tensor, count: Tensor) -> Statistics:
        """Those of all processes, the same bits on each."""
        values = count.new_full((1,), self._shape[0] * self._shape[2:].numel())
        size = dist.get_world_size(self._group)
        exchange = self._gathered if size <= GATHER_AT_MOST else self._reduced
        found, values = exchange(mean[0], m2[0], count[0], values, size)
        return self._with_single(found, values == 1)

    def sums(self, sum_grad: Tensor, sum_grad_xhat: Tensor) -> tuple[Tensor, Tensor]:
        """Σg and Σg·x̂ over all processes."""
        both = torch.stack([sum_grad, sum_grad_xhat])
        dist.all_reduce(both, group=self._group)
        return both[0], both[1]

    def population(self, statistics: Statistics) -> Statistics:
        """Those of all processes; of nothing where the running statistics served, which stay as they are."""
        if self._constant is None:
            return statistics
        mean, var, count = statistics
        return Statistics(mean, var, torch.where(self._constant, 0.0, count))

    def batches(self) -> int | Tensor:
        """One, unless the running statistics served."""
        return 1 if self._constant is None else (~self._constant).long().reshape(())

    def _gathered(
        self, mean: Tensor, m2: Tensor, count: Tensor, values: Tensor, size: int
    ) -> tuple[Statistics, Tensor]:
        """Everybody's numbers, merged in the order of the ranks; and how many values there are in all."""
        own = torch.cat([mean, m2, count, values])
        every = own.new_empty(size * own.shape[0])
        if dist.get_backend(self._group) == "mpi":  # the one backend that gathers into a list alone
            dist.all_gather(list(every.chunk(size)), own, group=self._group)
        else:
            # Its name up to PyTorch 2.12 is all_gather_into_tensor, which 2.13 warns of.
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            gather(every, own, group=self._group)
        channels = mean.shape[0]
        means, m2s, counts, held = every.view(size, -1).split([channels, channels, 1, 1], 1)
        return merged(Statistics(means, m2s / torch.where(counts > 0, counts, 1.0), counts)), held.sum()

    def _reduced(
        self, mean: Tensor, m2: Tensor, count: Tensor, values: Tensor, size: int
    ) -> tuple[Statistics, Tensor]:
        """Sums about the running mean; and how many values there are in all."""
        pivot = _pivot(self._running[0], mean)
        distance = mean - pivot
        first = count * distance
        digest = _digest(pivot)
        payload = torch.cat([first, m2 + first * distance, count, values, digest, digest.square()])
        dist.all_reduce(payload, group=self._group)
        channels = mean.shape[0]
        first, second, count, values, digests, squares = payload.split([channels, channels, 1, 1, 1, 1])
        demand(size * squares == digests.square(), _DIFFER)
        divisor = torch.where(count > 0, count, 1.0)
        distance = first / divisor
        var = ((second - first * distance) / divisor).clamp_min(0)
        return Statistics((pivot + distance)[None], var[None], count[None]), values.sum()

    def _with_single(self, found: Statistics, is_single: Tensor) -> Statistics:
        """What one value per channel in all processes together means, by the layer's rule.

        "error" raises where the number can be had for free, on a CPU; elsewhere, as with "zero", the variance is 0.
        """
        running_mean, running_var = self._running
        if self._single == "running" and running_mean is not None and running_var is not None:
            self._constant = is_single
            mean, var, count = found
            return Statistics(
                torch.where(is_single, running_mean.to(mean.dtype), mean),
                torch.where(is_single, running_var.to(var.dtype), var),
                torch.where(is_single, torch.inf, count),  # constants: no gradient goes through them
            )
        if self._single != "zero" and is_free(is_single) and is_single.item():
            raise InputError(
                f"Expected more than 1 value per channel when training, got input size {self._shape} and nothing on "
                "the other processes of the group. Use larger batches, or call eval() on the layer everywhere."
            )
        return found


def _pivot(running_mean: Tensor | None, like: Tensor) -> Tensor:
    """The running mean; 0 where there is none, or where it is not finite and would poison the sums."""
    if running_mean is None:
        return torch.zeros_like(like)
    # + 0.0 makes one of −0.0 and 0.0, which are the same pivot.
    return torch.nan_to_num(running_mean.to(like.dtype), 0.0, 0.0, 0.0) + 0.0


def _digest(pivot: Tensor) -> Tensor:
    """20 bits that depend on every bit of a float64 vector and its place, as one float64: integers, so exact."""
    places = torch.arange(1, pivot.shape[0] + 1, device=pivot.device)
    # Odd numbers without a pattern, of the splitmix64 generator; products wrap around.
    mixed = (pivot.view(torch.int64) ^ (places * 0x1E3779B97F4A7C15)) * 0x3F58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 29)) * 0x14D049BB133111EB
    whole = mixed.sum()
    return ((whole ^ (whole >> 31)) & 0xFFFFF).to(pivot.dtype).reshape(1)
