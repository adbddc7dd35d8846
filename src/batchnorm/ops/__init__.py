"""The operators: their schemas, their gradients, and which backend runs them.

Two doors lead to the same kernels, `train` and `normalize`: an autograd.Function where code runs eagerly,
registered operators where it is traced. A third way serves function transforms (vmap, jvp, nested grad): the
formula itself, in PyTorch's own operators.
"""

import torch
from torch import Tensor

from batchnorm import reference
from batchnorm._errors import InputError, message
from batchnorm.ops import aten, eager, formula, traced
from batchnorm.ops.aten import Running
from batchnorm.ops.backends import (
    COMPOSED,
    BackendChoice,
    Call,
    Candidate,
    check_name,
    choose,
    explain_backend,
    kernels_of,
)
from batchnorm.ops.held import HELD, Held, Take, held, moved, uncompiled
from batchnorm.ops.inplace import check_inplace, normalize_
from batchnorm.ops.looking import demand, is_free
from batchnorm.ops.policy import Policy, Statistics, merged, train_by
from batchnorm.ops.recompute import CAN_SEE, CHAIN, can_recompute, look_behind, look_behind_output, remember

__all__ = [
    "CAN_SEE",
    "CHAIN",
    "COMPOSED",
    "HELD",
    "BackendChoice",
    "Call",
    "Candidate",
    "Policy",
    "Running",
    "Statistics",
    "Take",
    "can_recompute",
    "check_inplace",
    "check_name",
    "choose",
    "demand",
    "explain_backend",
    "held",
    "is_free",
    "is_jit_tracing",
    "is_recomputation",
    "is_traced",
    "look_behind",
    "look_behind_output",
    "merged",
    "moments",
    "moved",
    "normalize",
    "normalize_",
    "remember",
    "train",
    "train_by",
    "uncompiled",
    "uncounted",
]


# Bound once: the look-ups through torch would be a third of the price.
_is_compiling = torch.compiler.is_compiling
_graph_task = torch._C._current_graph_task_id


def is_jit_tracing() -> bool:
    """Whether torch.jit.trace (and with it the older ONNX exporter) is recording."""
    return torch._C._get_tracing_state() is not None


def _is_traced(input: Tensor) -> bool:
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or type(input) not in (Tensor, torch.nn.Parameter)
        or is_jit_tracing()
    )


def is_traced(input: Tensor) -> bool:
    """Whether anything but plain execution looks on: a compiler, an export, a function transform, a mode."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or _is_traced(input)


def is_recomputation() -> bool:
    """Whether a backward pass is running in this thread, so that a forward can only be one that is done again.

    Activation checkpointing and functions that recompute in their backward do that; what the first forward has counted
    must not count again. Where code is traced the answer is no: a compiler repeats no mutation. 0.1 µs.
    """
    return not _is_compiling() and _graph_task() != -1


def uncounted(running: Running, backend: str) -> Running | None:
    """What a forward that is computed again is given to update."""
    if backend != "aten":
        return None
    # PyTorch's operator saves the buffers for its backward, and checkpoint compares what is saved with the first time.
    return running._replace(mean=running.mean.clone(), var=running.var.clone(), num_batches_tracked=None)


def _refuse_shared_buffers(mean: Tensor, running_mean: Tensor) -> None:
    """Under vmap every slice has statistics of its own, and one buffer cannot take them all."""
    batched = torch._C._functorch.is_batchedtensor
    if batched(mean) and not batched(running_mean):
        raise InputError(
            message(
                "running_mean and running_var under vmap",
                got="one pair of buffers for all slices",
                expected="batched buffers, or none",
                fix="Make the layer with track_running_stats=False, or call eval() on it.",
            )
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
    """Normalize by the batch's own statistics, and update the running ones and their counter."""
    if backend in COMPOSED and mask is None and groups == 1 and not is_traced(input):
        kernels = kernels_of(backend)
        if type(running) is not Held:
            return eager.train(kernels, input, weight, bias, residual, running, eps, activation, slope)
        lent = running.lend()
        output = eager.train(kernels, input, weight, bias, residual, lent, eps, activation, slope)
        running.take_back(lent, input.numel() // max(1, input.shape[1]))
        return output
    if running is not None and running.num_batches_tracked is not None:
        running.num_batches_tracked.add_(1)
    if backend == "aten":
        return aten.batch_norm(
            input, None, None, running, weight, bias, residual, mask, eps, activation, slope
        )
    arguments = (input, weight, bias, residual, mask, running, groups, eps, activation, slope, backend)
    if torch.compiler.is_compiling():
        return traced.train(*arguments)
    if torch._C._are_functorch_transforms_active():
        output, mean, var, count = formula.evaluate(
            input, weight, bias, residual, mask, None, groups, eps, activation, slope
        )
        if running is not None:
            _refuse_shared_buffers(mean, running.mean)
            running.update(reference, mean.detach(), var.detach(), count.detach())
        return output
    if _is_traced(input):
        return traced.train(*arguments)
    return eager.Train.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]


def moments(input: Tensor, mask: Tensor | None = None, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and m2 = Σ(x − mean)² of every group of samples, (G, C), and the counts (G, 1); no gradient."""
    # The backend is that of a call with a policy: one that has this primitive.
    name = choose(input, True, None, False, mask is not None, True, None)
    with torch.no_grad():
        found: tuple[Tensor, Tensor, Tensor] = kernels_of(name).moments(input.detach(), mask, groups)
    return found


def normalize(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: str | None,
    slope: float,
    backend: str,
) -> Tensor:
    """Normalize by the running statistics (C,), which are constants: eval mode."""
    if backend == "aten":
        return aten.batch_norm(
            input, running_mean, running_var, None, weight, bias, residual, mask, eps, activation, slope
        )
    if backend in COMPOSED and mask is None and not is_traced(input):
        return eager.evaluate(
            kernels_of(backend), input, weight, bias, residual, running_mean, running_var, eps, activation, slope
        )  # fmt: skip
    wide = torch.float32 if input.device.type == "mps" else torch.float64
    # Copies: training may move the buffers before the backward of this call.
    mean, var = running_mean.to(wide, copy=True)[None], running_var.to(wide, copy=True)[None]
    given = (mean, (var + eps).rsqrt())
    arguments = (input, weight, bias, residual, mask, *given, activation, slope, backend)
    if torch.compiler.is_compiling():
        return traced.normalize(*arguments)
    if torch._C._are_functorch_transforms_active():
        return formula.evaluate(input, weight, bias, residual, mask, given, 1, 0.0, activation, slope)[0]
    if _is_traced(input):
        return traced.normalize(*arguments)
    return eager.Normalize.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]
