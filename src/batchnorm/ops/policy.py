"""Statistics policies: what stands between the statistics of a batch and their use, and the training step by one.

The step is the four primitives with the policy between them:

    moments -> policy.statistics -> normalize          grad_sums -> policy.sums -> grad_input

Eager code goes through an autograd.Function, traced code through registered operators, function transforms through the
formula, as in plain batch norm.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm import reference
from batchnorm.ops import by_batch, formula, traced
from batchnorm.ops.aten import Running
from batchnorm.ops.backends import kernels_of
from batchnorm.ops.eager import keep, like

__all__ = ["Policy", "Statistics", "merged", "train_by"]


class Statistics(NamedTuple):
    """Per group: mean and biased variance, both (G, C), and counts (G, 1); float64 where the device has it."""

    mean: Tensor
    var: Tensor
    counts: Tensor


def merged(statistics: Statistics) -> Statistics:
    """The statistics of all groups together, as one group: Chan's formula, (12) of docs/math.md."""
    mean, var, count = statistics
    if mean.shape[0] == 1:
        return statistics
    total = count.sum(0, keepdim=True)
    share = count / torch.where(total > 0, total, 1.0)
    # About the first group's mean, so that an offset common to all cancels before it is rounded.
    first = mean[:1]
    shift = (share * (mean - first)).sum(0, keepdim=True)
    whole = first + shift
    return Statistics(
        whole, (share * (var + (mean - whole).square())).sum(0, keepdim=True), total.reshape(1, 1)
    )


class Policy:
    """Plain batch norm: the batch's own statistics. The members of the family override what they do otherwise."""

    # Whether the statistics are this process's alone. Where they are not, second derivatives and function transforms
    # are refused.
    local = True

    @property
    def group(self) -> str | None:
        """The name of the process group, for traced code."""
        return None

    def parts(self, shape: torch.Size) -> tuple[tuple[int, int], ...]:
        """How an input of this shape is cut: (samples, groups) one after another, groups of equal size within each."""
        return ((shape[0], 1),)

    def is_single(self, shape: torch.Size) -> bool:
        """Whether statistics are taken of one value per channel."""
        return shape[0] * shape[2:].numel() == 1

    def statistics(self, mean: Tensor, m2: Tensor, count: Tensor) -> Statistics:
        """What the input is normalized by, from what it holds: mean and m2 (G, C), count (G, 1)."""
        return Statistics(mean, m2 / torch.where(count > 0, count, 1.0), count)

    def correction(self, statistics: Statistics, eps: float) -> tuple[Tensor, Tensor] | None:
        """(r, d) where x̂ is to be r·x̂ + d, per channel (C,) and constant; None where x̂ stays."""
        return None

    def sums(self, sum_grad: Tensor, sum_grad_xhat: Tensor) -> tuple[Tensor, Tensor]:
        """Σg and Σg·x̂ over all that the statistics were taken of, from those of the input; asked if not local."""
        return sum_grad, sum_grad_xhat

    def population(self, statistics: Statistics) -> Statistics:
        """What moves the running statistics: one group."""
        return merged(statistics)

    def batches(self) -> int | Tensor:
        """What the step adds to num_batches_tracked."""
        return 1


class _NormalizeByBatch(torch.autograd.Function):
    """Normalize by statistics of the batch, which have been computed: the gradient goes through them."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        count: Tensor,
        eps: float,
        activation: str | None,
        slope: float,
        backend: str,
        policy: Policy,
    ) -> Tensor:
        kernels = kernels_of(backend)
        output, saved = kernels.normalize(
            input, mean, invstd, weight, bias, residual, mask, activation, slope
        )
        kept = keep(activation, residual, saved)
        ctx.save_for_backward(input, weight, bias, mask, mean, invstd, count, kept)
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.rule = (eps, activation, slope, backend, kernels)
        ctx.sums_of_all = None if policy.local else policy.sums
        return like(output, input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grads: formula.Gradients = by_batch.gradients(
            ctx.saved_tensors, grad_output, ctx.residual_dtype, *ctx.rule, sums_of_all=ctx.sums_of_all
        )
        wanted = (grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False))
        return (*wanted, *(None,) * 9)


def _cut(tensor: Tensor | None, sizes: list[int]) -> tuple[Tensor | None, ...]:
    """Consecutive parts of these sizes; where there is one part, the tensor itself."""
    if tensor is None or len(sizes) == 1:
        return (tensor,) * len(sizes)
    parts: tuple[Tensor, ...] = tensor.split(sizes)
    return parts


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def _corrected(
    weight: Tensor | None, bias: Tensor | None, correction: tuple[Tensor, Tensor] | None
) -> tuple[Tensor | None, Tensor | None]:
    """γ and β with (r, d) taken in: γ·(r·x̂ + d) + β = (γ·r)·x̂ + (γ·d + β)."""
    if correction is None:
        return weight, bias
    r, d = correction
    scale = r if weight is None else weight * r
    shift = d if weight is None else weight * d
    return scale, shift if bias is None else bias + shift


def train_by(
    policy: Policy,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running: Running | None,
    eps: float,
    activation: str | None,
    slope: float,
    backend: str,
    is_traced: bool,
) -> Tensor:
    """A training step with a policy between its halves; updates the running statistics and their counter."""
    transformed = torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()
    kernels: Any
    if transformed:
        by_batch.refuse_others(policy.local, "function transforms (torch.func)")
        kernels = reference
    else:
        kernels = traced.Registered(backend) if is_traced else kernels_of(backend)
    parts = policy.parts(input.shape)
    sizes, groups = [size for size, _ in parts], [number for _, number in parts]
    inputs, residuals, masks = _cut(input, sizes), _cut(residual, sizes), _cut(mask, sizes)
    with torch.set_grad_enabled(transformed and torch.is_grad_enabled()):
        found = [kernels.moments(*each) for each in zip(inputs, masks, groups, strict=True)]
        statistics = policy.statistics(*(_joined(column) for column in zip(*found, strict=True)))
        with torch.no_grad():
            correction = policy.correction(statistics, eps)
        given = (statistics.mean, (statistics.var + eps).rsqrt(), statistics.counts)
    weight, bias = _corrected(weight, bias, correction)
    outputs = []
    for x, added, valid, mean, invstd, counts in zip(
        inputs, residuals, masks, *(_cut(each, groups) for each in given), strict=True
    ):
        if transformed:
            y = reference.normalize(x, mean, invstd, weight, bias, added, valid, activation, slope)[0]
        else:
            arguments = (x, weight, bias, added, valid, mean, invstd, counts, eps, activation, slope, backend)
            if is_traced:
                y = traced.normalize_by_batch(*arguments, policy.group)
            else:
                y = _NormalizeByBatch.apply(*arguments, policy)  # type: ignore[no-untyped-call]
        outputs.append(y)
    if running is not None:
        if running.num_batches_tracked is not None:
            running.num_batches_tracked.add_(policy.batches())
        with torch.no_grad():
            population = policy.population(statistics)
        running.update(kernels, *(each.detach() for each in population))
    return like(_joined(outputs), input)
