"""Batch renormalization: a correction towards the running statistics, through which no gradient flows."""

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from batchnorm._errors import message
from batchnorm.ops import Policy, Statistics, demand, is_jit_tracing, is_recomputation

__all__ = ["Knots", "Renorm", "bound_at"]

# (batch, value) pairs in the order of the batches: linear between them, constant before and behind.
Knots = tuple[tuple[int, float], ...]
Correction = tuple[Tensor, Tensor]

# A forward that is computed again in a backward pass must be corrected as it was, but the running statistics have moved
# since: for each layer's running mean what its last forwards were corrected by, with the statistics that they are known
# by. So many forwards may come before the first backward. 4 numbers of float64 a channel and forward: 0.26 MB for 512.
FORWARDS = 32
_SEEN: Any = WeakTensorKeyDictionary()
_FORGOTTEN = message(
    "BatchRenorm under activation checkpointing",
    got=f"more than {FORWARDS} forwards of a layer before their backward",
    expected=f"at most {FORWARDS}, whose corrections are kept",
    fix="Checkpoint fewer calls of it at once.",
)


def _holds_numbers(mean: Tensor) -> bool:
    """Whether this is a computation, and not a trace of one; a mode that looks on changes nothing."""
    return (
        type(mean) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not is_jit_tracing()
    )


def bound_at(knots: Knots, step: Tensor) -> Tensor | float:
    """The bound at a batch, as a tensor without asking for the step's value."""
    first, value = knots[0]
    bound: Tensor | float = value
    for after, next_value in knots[1:]:
        if next_value != value:
            bound = bound + (next_value - value) * ((step - first) / (after - first)).clamp(0, 1)
        first, value = after, next_value
    return bound


class Renorm(Policy):
    """r = clip(σ_batch / σ, 1/r_max, r_max) and d = clip((μ_batch − μ) / σ, −d_max, d_max) by the running μ and σ."""

    def __init__(
        self,
        running_mean: Tensor,
        running_var: Tensor,
        num_batches_tracked: Tensor,
        r_max: Knots,
        d_max: Knots,
        warmup: int,
    ) -> None:
        self.running_mean, self.running_var = running_mean, running_var
        self.num_batches_tracked = num_batches_tracked
        self.r_max, self.d_max, self.warmup = r_max, d_max, warmup

    def correction(self, statistics: Statistics, eps: float) -> tuple[Tensor, Tensor]:
        """(r, d); (1, 0) during the warm-up."""
        found = self._now(statistics, eps)
        if not _holds_numbers(statistics.mean):
            return found
        # Not seen by modes that look on: selective checkpointing wants the same operators both times.
        with _disable_current_modes():
            return self._before(statistics, found) if is_recomputation() else self._keep(statistics, found)

    def _keep(self, statistics: Statistics, found: Correction) -> Correction:
        if self.running_mean not in _SEEN:
            _SEEN[self.running_mean] = deque(maxlen=FORWARDS)
        _SEEN[self.running_mean].append((statistics.mean, statistics.var, *found))
        return found

    def _before(self, statistics: Statistics, found: Correction) -> Correction:
        """The correction that the first computation of this batch has got; the device is not asked which one it was."""
        seen = _SEEN.get(self.running_mean, ())
        known = statistics.mean.new_zeros((), dtype=torch.bool)
        for mean, var, r, d in seen:
            same = (mean == statistics.mean).all() & (var == statistics.var).all()
            found = r.where(same, found[0]), d.where(same, found[1])
            known = known | same
        if (
            len(seen) == FORWARDS
        ):  # with fewer, none was forgotten: this is a first forward inside of a backward
            demand(known | ~statistics.mean.isfinite().all(), _FORGOTTEN)
        return found

    def _now(self, statistics: Statistics, eps: float) -> Correction:
        """By the running statistics as they are."""
        wide = statistics.mean.dtype
        step = self.num_batches_tracked.to(wide)
        r_max, d_max = bound_at(self.r_max, step), bound_at(self.d_max, step)
        mean, var = statistics.mean[0], statistics.var[0] + eps
        invstd = (self.running_var.to(wide) + eps).rsqrt()
        r = var.sqrt() * invstd
        d = (mean - self.running_mean.to(wide)) * invstd
        warm = step >= self.warmup
        empty = statistics.counts[0] <= 0
        r = r.minimum(r.new_ones(()) * r_max).maximum(r.new_ones(()) / r_max)
        d = d.minimum(d.new_ones(()) * d_max).maximum(d.new_ones(()) * -d_max)
        plain = ~warm | empty
        return r.where(~plain, 1.0), d.where(~plain, 0.0)
