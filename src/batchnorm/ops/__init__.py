"""The operators: their schemas, their gradients, and which backend runs them.

Two doors lead to the same kernels, `train` and `normalize`: an autograd.Function where code runs eagerly,
registered operators where it is traced. A third way serves function transforms (vmap, jvp, nested grad): the
formula itself, in PyTorch's own operators.
"""

import torch
from torch import Tensor

from batchnorm import reference
from batchnorm.ops import aten, eager, formula, traced
from batchnorm.ops.aten import Running
from batchnorm.ops.backends import BackendChoice, Call, Candidate, choose, explain_backend

__all__ = [
    "BackendChoice",
    "Call",
    "Candidate",
    "Running",
    "aten_batch_norm",
    "choose",
    "explain_backend",
    "is_jit_tracing",
    "normalize",
    "train",
]

aten_batch_norm = aten.batch_norm


def is_jit_tracing() -> bool:
    """Whether torch.jit.trace (and with it the older ONNX exporter) is recording."""
    return torch._C._get_tracing_state() is not None


def _is_traced(input: Tensor) -> bool:
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or type(input) not in (Tensor, torch.nn.Parameter)
        or is_jit_tracing()
    )


def train(
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
    """Normalize by the batch's own statistics, and update the running ones."""
    arguments = (input, weight, bias, residual, mask, running, groups, eps, activation, slope, backend)
    if torch.compiler.is_compiling():
        return traced.train(*arguments)
    if torch._C._are_functorch_transforms_active():
        output, mean, var, count = formula.evaluate(
            input, weight, bias, residual, mask, None, groups, eps, activation, slope
        )
        if running is not None:
            reference.update_running_(*running[:3], mean, var, count, *running[3:])
        return output
    if _is_traced(input):
        return traced.train(*arguments)
    return eager.Train.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]


def normalize(
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
    """Normalize by given statistics (G, C), which are constants: eval mode, frozen layers."""
    arguments = (input, weight, bias, residual, mask, mean, invstd, activation, slope, backend)
    if torch.compiler.is_compiling():
        return traced.normalize(*arguments)
    if torch._C._are_functorch_transforms_active():
        given = (mean, invstd)
        return formula.evaluate(
            input, weight, bias, residual, mask, given, mean.shape[0], 0.0, activation, slope
        )[0]
    if _is_traced(input):
        return traced.normalize(*arguments)
    return eager.Normalize.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]
