"""PyTorch's own batch norm, followed by its own addition and activation, under its own autograd.

Every transform of PyTorch knows these operators: autograd to any order, vmap, compile, export, ONNX.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm import reference
from batchnorm._activations import activation_named

__all__ = ["Running", "batch_norm", "normalize"]


class Running(NamedTuple):
    """The buffers that training updates, and the rule."""

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None
    momentum: float | None
    skip_nonfinite: bool

    def update(self, kernels: Any, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Move the buffers by a batch that has been counted: mean and biased variance (1, C), count (1, 1)."""
        kernels.update_running_(*self[:3], mean, var, count, *self[3:])


def batch_norm(
    input: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    running: Running | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
) -> Tensor:
    """y = act(batch norm(input) + residual). With `mean` and `var`: eval; without: training.

    A mask works in eval alone, where the statistics do not depend on it.
    """
    valid = None if mask is None else (mask > 0).unsqueeze(1)
    if valid is not None:
        input = torch.where(valid, input, 0.0)
        residual = None if residual is None else torch.where(valid, residual, 0.0)
    if mean is None:
        y = _train(input, running, weight, bias, eps)
    else:
        y = torch.batch_norm(input, weight, bias, mean, var, False, 0.0, eps, torch.backends.cudnn.enabled)
    if residual is not None:
        y = y + residual if residual.dtype == y.dtype else y + residual.to(y.dtype)
    act = activation_named(activation)
    if act is not None:
        y = act.forward(y, slope)
    return y if valid is None else torch.where(valid, y, 0.0)


def normalize(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: None,
    activation: str | None,
    slope: float,
    eps: float,
) -> Tensor:
    """`batch_norm` by the statistics (C,) of an earlier call of it, whatever autocast says now."""
    with torch.autocast(input.device.type, enabled=False):
        return batch_norm(input, mean, var, None, weight, bias, residual, mask, eps, activation, slope)


def _train(
    input: Tensor, running: Running | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    cudnn = torch.backends.cudnn.enabled
    if running is None:
        return torch.batch_norm(input, weight, bias, None, None, True, 0.0, eps, cudnn)
    if running.momentum is not None and not running.skip_nonfinite:
        return torch.batch_norm(
            input, weight, bias, running.mean, running.var, True, running.momentum, eps, cudnn
        )
    # A momentum of 1 writes this batch's own mean and unbiased variance into buffers that start at 0, and the
    # running statistics are then updated by our rule, without asking the device for num_batches_tracked.
    mean, var = torch.zeros_like(running.mean), torch.zeros_like(running.var)
    y = torch.batch_norm(input, weight, bias, mean, var, True, 1.0, eps, cudnn)
    n = input.numel() // max(1, input.shape[1])
    count = torch.full((1, 1), torch.sym_float(n), dtype=torch.float64, device=input.device)
    biased = var.double() * ((n - 1) / n) if n else var.double()
    running.update(reference, mean.double()[None], biased[None], count)
    return y
