"""What layers composed of PyTorch's own operators share: their dtypes, the centering, and what follows it.

Element work is float32, or float64 for float64 input; statistics are float64 where the device has it.
"""

from typing import Any

import torch
from torch import Tensor

from batchnorm._activations import activation_named
from batchnorm.ops.eager import like

__all__ = ["centered", "finish", "less", "per_one", "statistics_dtype", "working_dtype"]


def statistics_dtype(input: Tensor) -> torch.dtype:
    """Of means, variances and covariances."""
    return torch.float32 if input.device.type == "mps" else torch.float64


def working_dtype(input: Tensor) -> torch.dtype:
    """Of everything that has the size of the input."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def per_one(sums: Tensor, count: Tensor) -> Tensor:
    """Sums over a count that may be 0, as those of nothing are."""
    return sums / torch.where(count > 0, count, 1.0)


def less(x: Tensor, mean: Tensor) -> Tensor:
    """x − mean in the dtype of x, by the mean's two halves in that dtype: rounded to one, an offset of 10⁷ σ would
    cost a digit of σ.
    """
    high = mean.to(x.dtype)
    return x - high if mean.dtype == x.dtype else (x - high) - (mean - high).to(x.dtype)


class _Center(torch.autograd.Function):
    """(x − μ, μ) with μ = Σwx / n over `dims`; 0 where w is. One sum of float64 each way."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor | None, n: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        if w is None:
            mean = per_one(x.sum(dims, keepdim=True, dtype=n.dtype), n)
            return less(x, mean), mean
        x = torch.where(w > 0, x, 0.0)
        mean = per_one((x * w).sum(dims, keepdim=True), n)
        return torch.where(w > 0, less(x, mean), 0.0), mean

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, w, n, ctx.dims = inputs
        ctx.save_for_backward(w, n)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_mean: Tensor) -> tuple[Tensor | None, ...]:
        # dx = g − w·(Σg − dμ) / n
        w, n = ctx.saved_tensors
        if w is not None:
            grad = torch.where(w > 0, grad, 0.0)
        share = per_one(grad.sum(ctx.dims, keepdim=True, dtype=n.dtype) - grad_mean, n)
        return less(grad, share) if w is None else grad - (share * w).to(grad.dtype), None, None, None


def centered(x: Tensor, w: Tensor | None, n: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x − μ and μ, the mean over `dims` with the frequencies w, whose sum n has the dtype of statistics."""
    found: tuple[Tensor, Tensor] = _Center.apply(x, w, n, dims)  # type: ignore[no-untyped-call]
    return found


def finish(
    z: Tensor,
    input: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str | None,
    slope: float,
) -> Tensor:
    """act(z + residual), 0 where the mask is, in the dtype and the memory layout of the input."""
    valid = None if mask is None else (mask > 0).unsqueeze(1)
    if residual is not None:
        added = residual.to(z.dtype)
        z = z + (added if valid is None else torch.where(valid, added, 0.0))
    act = activation_named(activation)
    if act is not None:
        z = act.forward(z, slope)
    if valid is not None:
        z = torch.where(valid, z, 0.0)
    return like(z.to(input.dtype), input)
