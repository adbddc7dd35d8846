"""Batch norm as one differentiable expression: what second derivatives and function transforms go through."""

from types import ModuleType

import torch
from torch import Tensor

from batchnorm import reference
from batchnorm._activations import activation_named

__all__ = ["Gradients", "evaluate", "gradients"]

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def evaluate(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None,
    groups: int,
    eps: float,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, ...]:
    """(output, mean, var, count) in training; (output,) with `statistics` = (mean, invstd) given."""
    if statistics is None:
        return reference.forward(input, weight, bias, residual, mask, groups, eps, activation, slope)[:4]
    return reference.normalize(input, *statistics, weight, bias, residual, mask, activation, slope)[:1]


def gradients(
    kernels: ModuleType,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor,
    residual: bool,
    mask: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None,
    groups: int,
    eps: float,
    activation: str | None,
    slope: float,
) -> Gradients:
    """The gradients with respect to (input, weight, bias, residual), themselves differentiable.

    Where act′ takes two values, its bits are constants: g = dy·act′ is linear, and no pre-activation is needed.
    """
    act = activation_named(activation)
    added, grad_residual = (kept if residual else None), None
    if residual and (act is None or act.on is not None):
        if act is not None:
            grad_output = act.backward_from_bits(grad_output, kernels.unpack(kept, input), slope)
        if mask is not None:
            grad_output = torch.where((mask > 0).unsqueeze(1), grad_output, 0.0)
        added, activation, grad_residual = None, None, grad_output
    given = (input, weight, bias, added)
    if not any(t is not None and t.requires_grad for t in given):
        return None, None, None, grad_residual
    with torch.enable_grad():
        # Aliases, because one argument may depend on another (a residual made from the input): the path between
        # them is the outer graph's to follow, and would count twice.
        x = input.view_as(input)
        w, b, r = (None if t is None else t.view_as(t) for t in (weight, bias, added))
        tensors = (x, w, b, r)
        chosen = [t for t in tensors if t is not None and t.requires_grad]
        output = evaluate(x, w, b, r, mask, statistics, groups, eps, activation, slope)[0]
        found = iter(torch.autograd.grad(output, chosen, grad_output, create_graph=True))
    dx, dweight, dbias, dadded = (next(found) if t is not None and t.requires_grad else None for t in tensors)
    return dx, dweight, dbias, dadded if grad_residual is None else grad_residual
