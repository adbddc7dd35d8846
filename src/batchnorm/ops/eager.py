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

__all__ = ["Normalize", "Train", "keep", "like"]


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
            kernels.update_running_(*running[:3], mean, var, count, *running[3:])
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
