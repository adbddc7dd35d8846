"""Statistics policies: what stands between the statistics of a batch and their use, and the training step by one.

The step is the four primitives with the policy between them:

    moments -> policy.statistics -> normalize          grad_sums -> policy.sums -> grad_input

One autograd.Function serves eager and traced code: where code is traced it calls the registered operators.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm import reference
from batchnorm._errors import ModelError, message
from batchnorm.ops import formula, traced
from batchnorm.ops.aten import Running
from batchnorm.ops.backends import kernels_of
from batchnorm.ops.eager import keep, like
from batchnorm.reference import parameter_grad

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

    # Whether other processes have a say: then second derivatives and function transforms are refused.
    local = True

    def groups(self, input: Tensor) -> int:
        """G, a divisor of the batch: statistics are taken of N / G consecutive samples each."""
        return 1

    def statistics(self, mean: Tensor, m2: Tensor, count: Tensor) -> Statistics:
        """What the input is normalized by, from what it holds: mean and m2 (G, C), count (G, 1)."""
        return Statistics(mean, m2 / torch.where(count > 0, count, 1.0), count)

    def correction(self, statistics: Statistics, eps: float) -> tuple[Tensor, Tensor] | None:
        """(r, d) where x̂ is to be r·x̂ + d, per channel (C,) and constant; None where x̂ stays."""
        return None

    def sums(self, sum_grad: Tensor, sum_grad_xhat: Tensor) -> tuple[Tensor, Tensor]:
        """Σg and Σg·x̂ over all that the statistics were taken of, from those of the input."""
        return sum_grad, sum_grad_xhat

    def population(self, statistics: Statistics) -> Statistics:
        """What moves the running statistics: one group."""
        return merged(statistics)


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
        policy: Policy,
        eps: float,
        activation: str | None,
        slope: float,
        kernels: Any,
        backend: str,
    ) -> Tensor:
        output, saved = kernels.normalize(
            input, mean, invstd, weight, bias, residual, mask, activation, slope
        )
        ctx.save_for_backward(
            input, weight, bias, mask, mean, invstd, count, keep(activation, residual, saved)
        )
        ctx.policy, ctx.kernels, ctx.backend, ctx.eps = policy, kernels, backend, eps
        ctx.activation, ctx.slope = activation, slope
        ctx.residual_dtype = None if residual is None else residual.dtype
        return like(output, input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, mask, mean, invstd, count, kept = ctx.saved_tensors
        residual = ctx.residual_dtype is not None
        rule = (ctx.activation, ctx.slope)
        grads: formula.Gradients
        if torch.is_grad_enabled():
            _refuse_unless_local(ctx.policy, "second derivatives")
            grads = formula.gradients(
                kernels_of(ctx.backend),
                grad_output,
                input,
                weight,
                bias,
                kept,
                residual,
                mask,
                None,
                mean.shape[0],
                ctx.eps,
                *rule,
            )
        else:
            common = (grad_output, input, mean, invstd, weight, bias, kept, residual, mask)
            sums = ctx.kernels.grad_sums(*common, *rule)
            whole = ctx.policy.sums(*sums)
            dx, dresidual = ctx.kernels.grad_input(*common, *whole, count, *rule)
            grads = (
                like(dx, input),
                None if weight is None else parameter_grad(sums[1], weight),
                None if bias is None else parameter_grad(sums[0], bias),
                like(dresidual, input).to(ctx.residual_dtype) if residual else None,
            )
        wanted = (grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False))
        return (*wanted, *(None,) * 10)


def _refuse_unless_local(policy: Policy, what: str) -> None:
    if not policy.local:
        raise ModelError(
            message(
                f"{what} of a layer whose statistics are those of several processes",
                got=type(policy).__name__,
                expected="first derivatives by autograd",
                fix="Use a layer with statistics of its own: batchnorm.convert(model, 'batchnorm').",
            )
        )


def _corrected(
    weight: Tensor | None, bias: Tensor | None, correction: tuple[Tensor, Tensor] | None, input: Tensor
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
    kernels: Any = reference
    if transformed:
        _refuse_unless_local(policy, "function transforms (torch.func)")
    else:
        kernels = traced.Registered(backend) if is_traced else kernels_of(backend)
    if running is not None and running.num_batches_tracked is not None:
        running.num_batches_tracked.add_(1)
    groups = policy.groups(input)
    with torch.set_grad_enabled(transformed and torch.is_grad_enabled()):
        statistics = policy.statistics(*kernels.moments(input, mask, groups))
        with torch.no_grad():
            correction = policy.correction(statistics, eps)
        mean, invstd = statistics.mean, (statistics.var + eps).rsqrt()
    weight, bias = _corrected(weight, bias, correction, input)
    if transformed:
        output: Tensor = reference.normalize(
            input, mean, invstd, weight, bias, residual, mask, activation, slope
        )[0]
    else:
        output = _NormalizeByBatch.apply(  # type: ignore[no-untyped-call]
            input,
            weight,
            bias,
            residual,
            mask,
            mean,
            invstd,
            statistics.counts,
            policy,
            eps,
            activation,
            slope,
            kernels,
            backend,
        )
    if running is not None:
        with torch.no_grad():
            found = policy.population(statistics)
        kernels.update_running_(*running[:3], *(each.detach() for each in found), *running[3:])
    return output
