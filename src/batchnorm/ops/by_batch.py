"""The gradient of `normalize` by statistics of the batch: it goes through them. Both doors share it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm._errors import ModelError, message
from batchnorm.ops import formula
from batchnorm.ops.backends import kernels_of
from batchnorm.ops.eager import like
from batchnorm.reference import parameter_grad

__all__ = ["gradients", "refuse_others"]


def refuse_others(local: bool, what: str) -> None:
    """Refuse what cannot be had where statistics are those of several processes."""
    if not local:
        raise ModelError(
            message(
                f"{what} of a layer whose statistics are those of several processes",
                got="a synchronized batch norm",
                expected="first derivatives by autograd",
                fix="Use layers with statistics of their own: batchnorm.convert(model, 'batchnorm').",
            )
        )


def gradients(
    saved: tuple[Tensor, ...],
    grad_output: Tensor,
    residual_dtype: torch.dtype | None,
    eps: float,
    activation: str | None,
    slope: float,
    backend: str,
    primitives: Any,
    *,
    sums_of_all: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
) -> formula.Gradients:
    """Of (input, weight, bias, residual). `sums_of_all` makes the input's sums those of all processes, if there are
    others.
    """
    input, weight, bias, mask, mean, invstd, count, kept = saved
    residual = residual_dtype is not None
    if torch.is_grad_enabled():
        refuse_others(sums_of_all is None, "second derivatives")
        return formula.gradients(
            kernels_of(backend),
            grad_output,
            input,
            weight,
            bias,
            kept,
            residual,
            mask,
            None,
            mean.shape[0],
            eps,
            activation,
            slope,
        )
    common = (grad_output, input, mean, invstd, weight, bias, kept, residual, mask)
    sums = primitives.grad_sums(*common, activation, slope)
    whole = sums if sums_of_all is None else sums_of_all(*sums)
    dx, dresidual = primitives.grad_input(*common, *whole, count, activation, slope)
    return (
        like(dx, input),
        None if weight is None else parameter_grad(sums[1], weight),
        None if bias is None else parameter_grad(sums[0], bias),
        like(dresidual, input).to(residual_dtype) if residual else None,
    )
