"""The eager door: one autograd.Function a mode, which calls the backend directly.

A registered operator costs 70 µs more a layer, forward and backward, than a bare autograd.Function
(4×8, float32, measured on a 2-core CPU), so only traced code goes through operators.
"""

from typing import Any

import torch
from torch import Tensor

from batchnorm._activations import activation_named
from batchnorm.ops import formula
from batchnorm.ops.aten import Running
from batchnorm.ops.backends import kernels_of
from batchnorm.reference import parameter_grad

__all__ = ["Normalize", "Train", "evaluate", "keep", "like", "statistics_of", "train"]


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """`tensor` in the memory layout that torch.empty_like(model) has."""
    if (
        tensor.stride() == model.stride()
        or tensor.stride() == torch.empty_like(model, device="meta").stride()
    ):
        return tensor
    return torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)


def keep(activation: str | None, residual: Tensor | None, saved: Tensor) -> Tensor:
    """What backward must be given beside the input: nothing, the bits of act′, or the residual."""
    act = activation_named(activation)
    return residual if residual is not None and act is not None and act.on is None else saved


def _hand_back(
    grads: formula.Gradients, needs: tuple[bool, ...], residual_dtype: torch.dtype | None, arguments: int
) -> tuple[Tensor | None, ...]:
    """(input, weight, bias, residual) gradients where they are needed, and None for every other argument."""
    dx, dweight, dbias, dresidual = (grad if need else None for grad, need in zip(grads, needs, strict=False))
    if dresidual is not None and residual_dtype is not None:
        dresidual = dresidual.to(residual_dtype)
    return (dx, dweight, dbias, dresidual, *(None,) * (arguments - 4))


class Train(torch.autograd.Function):
    """Statistics of the batch; updates the running statistics in the same call."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        running: Running | None,
        groups: int,
        eps: float,
        activation: str | None,
        slope: float,
        backend: str,
    ) -> Tensor:
        kernels = kernels_of(backend)
        output, mean, var, count, saved = kernels.forward(
            input, weight, bias, residual, mask, groups, eps, activation, slope
        )
        if running is not None:
            running.update(kernels, mean, var, count)
        ctx.save_for_backward(input, weight, bias, mask, mean, var, count, keep(activation, residual, saved))
        ctx.kernels, ctx.rule, ctx.groups = kernels, (eps, activation, slope), groups
        ctx.residual_dtype = None if residual is None else residual.dtype
        return like(output, input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, mask, mean, var, count, kept = ctx.saved_tensors
        residual = ctx.residual_dtype is not None
        grads: formula.Gradients
        if torch.is_grad_enabled():
            grads = formula.gradients(
                ctx.kernels,
                grad_output,
                input,
                weight,
                bias,
                kept,
                residual,
                mask,
                None,
                ctx.groups,
                *ctx.rule,
            )
        else:
            dx, dweight, dbias, dresidual = ctx.kernels.backward(
                grad_output, input, mean, var, count, weight, bias, kept, residual, mask, *ctx.rule
            )
            grads = like(dx, input), dweight, dbias, like(dresidual, input) if residual else None
        return _hand_back(grads, ctx.needs_input_grad, ctx.residual_dtype, 11)


class Normalize(torch.autograd.Function):
    """Statistics given, as constants: eval mode and frozen layers."""

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
        activation: str | None,
        slope: float,
        backend: str,
    ) -> Tensor:
        kernels = kernels_of(backend)
        output, saved = kernels.normalize(
            input, mean, invstd, weight, bias, residual, mask, activation, slope
        )
        ctx.save_for_backward(input, weight, bias, mask, mean, invstd, keep(activation, residual, saved))
        ctx.kernels, ctx.rule = kernels, (activation, slope)
        ctx.residual_dtype = None if residual is None else residual.dtype
        return like(output, input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grads = normalize_gradients(ctx, grad_output, ctx.kernels, ctx.kernels)
        return _hand_back(grads, ctx.needs_input_grad, ctx.residual_dtype, 10)


class Whole(torch.autograd.Function):
    """`Train` for kernels that do all of a direction in one call: statistics, output, running statistics, counter."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running: Running | None,
        eps: float,
        activation: str | None,
        slope: float,
        kernels: Any,
    ) -> Tensor:
        output, kept, statistics = kernels.train_forward(
            input, weight, bias, residual, running, eps, activation, slope
        )
        if residual is None:
            ctx.save_for_backward(input, weight, bias)
        else:
            ctx.save_for_backward(input, weight, bias, keep(activation, residual, kept))
        ctx.call = (kernels, statistics, None if residual is None else residual.dtype, eps, activation, slope)
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, *rest = ctx.saved_tensors
        kept = rest[0] if rest else None
        kernels, statistics, residual_dtype, eps, activation, slope = ctx.call
        residual = residual_dtype is not None
        if torch.is_grad_enabled():
            grads = formula.gradients(
                kernels,
                grad_output,
                input,
                weight,
                bias,
                kept if kept is not None else input.new_empty(0, dtype=torch.uint8),
                residual,
                None,
                None,
                1,
                eps,
                activation,
                slope,
            )
        else:
            grads = kernels.train_backward(
                grad_output, input, statistics, weight, bias, kept, residual, eps, activation, slope
            )
        dx, dweight, dbias, dresidual = grads
        if dresidual is not None and dresidual.dtype != residual_dtype:
            dresidual = dresidual.to(residual_dtype)
        return dx, dweight, dbias, dresidual, None, None, None, None, None


# The apply under torch.autograd.Function.apply, whose wrapper looks for function transforms: the caller has, and the
# look costs 2 µs a call.
_apply_whole: Any = super(torch.autograd.Function, Whole).apply


def train(
    kernels: Any,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: Running | None,
    eps: float,
    activation: str | None,
    slope: float,
) -> Tensor:
    """A training step by kernels that compose it themselves; counts the batch."""
    return _apply_whole(input, weight, bias, residual, running, eps, activation, slope, kernels)  # type: ignore[no-any-return]


def statistics_of(node: Any) -> tuple[Tensor, Tensor]:
    """(mean, var) of a training call, (mean, invstd) of a call in eval mode, from the node of its output."""
    if hasattr(node, "call"):
        statistics: Tensor = node.call[1]
        return statistics[:1], statistics[1:]
    saved = node.saved_tensors
    return saved[4], saved[5]


class Evaluate(torch.autograd.Function):
    """`Normalize` by running statistics for kernels that read them themselves."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        activation: str | None,
        slope: float,
        kernels: Any,
    ) -> Tensor:
        output, bits, statistics = kernels.eval_forward(
            input, running_mean, running_var, weight, bias, residual, eps, activation, slope
        )
        kept = torch.empty(0, dtype=torch.uint8) if residual is None else keep(activation, residual, bits)
        ctx.save_for_backward(input, weight, bias, None, statistics[:1], statistics[1:], kept)
        ctx.kernels, ctx.rule = kernels, (activation, slope)
        ctx.residual_dtype = None if residual is None else residual.dtype
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grads = normalize_gradients(ctx, grad_output, ctx.kernels, ctx.kernels)
        return _hand_back(grads, ctx.needs_input_grad, ctx.residual_dtype, 10)


def evaluate(
    kernels: Any,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: str | None,
    slope: float,
) -> Tensor:
    """Eval mode; without a gradient to come nothing is kept, and autograd is not asked."""
    if torch.is_grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return Evaluate.apply(  # type: ignore[no-any-return, no-untyped-call]
            input, weight, bias, residual, running_mean, running_var, eps, activation, slope, kernels
        )
    return kernels.eval_forward(  # type: ignore[no-any-return]
        input, running_mean, running_var, weight, bias, residual, eps, activation, slope
    )[0]


def normalize_gradients(ctx: Any, grad_output: Tensor, kernels: Any, primitives: Any) -> formula.Gradients:
    """The gradients of `normalize` for both doors, which save the same and differ in who runs the `primitives`."""
    input, weight, bias, mask, mean, invstd, kept = ctx.saved_tensors
    residual = ctx.residual_dtype is not None
    if not torch.is_grad_enabled():
        return constant_statistics_gradients(
            primitives, grad_output, input, mean, invstd, weight, bias, kept, residual, mask, *ctx.rule
        )
    return formula.gradients(
        kernels,
        grad_output,
        input,
        weight,
        bias,
        kept,
        residual,
        mask,
        (mean, invstd),
        mean.shape[0],
        0.0,
        *ctx.rule,
    )


def constant_statistics_gradients(
    kernels: Any,
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor,
    residual: bool,
    mask: Tensor | None,
    activation: str | None,
    slope: float,
) -> formula.Gradients:
    """Eval mode's gradients from the two primitives: with both sums 0 the statistics do not move."""
    common = (grad_output, input, mean, invstd, weight, bias, kept, residual, mask)
    dweight = dbias = None
    if weight is not None or bias is not None:
        sum_grad, sum_grad_xhat = kernels.grad_sums(*common, activation, slope)
        dweight = None if weight is None else parameter_grad(sum_grad_xhat, weight)
        dbias = None if bias is None else parameter_grad(sum_grad, bias)
    zero = torch.zeros_like(mean)
    one = mean.new_ones(mean.shape[0], 1)
    dx, dresidual = kernels.grad_input(*common, zero, zero, one, activation, slope)
    return like(dx, input), dweight, dbias, like(dresidual, input) if residual else None
