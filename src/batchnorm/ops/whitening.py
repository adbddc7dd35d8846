"""Whitening: the covariance of groups of channels, and its inverse square root by eigenvectors or by iteration.

A batch is seen as (G, g, M): G groups of g channels, and their values.
"""

from typing import Any

import torch
from torch import Tensor

from batchnorm.ops.composed import centered, less, per_one, statistics_dtype, working_dtype

__all__ = ["Whitening", "from_rows", "inverse_root", "to_rows", "update_running_", "whiten", "whiten_by"]


def to_rows(input: Tensor, groups: int) -> Tensor:
    """(N, C, *S) as (G, g, N·S), in the working dtype."""
    batch, channels, positions = input.shape[0], input.shape[1], input.shape[2:].numel()
    x = input.reshape(batch, groups, channels // groups, positions).permute(1, 2, 0, 3)
    x = x.to(working_dtype(input), memory_format=torch.contiguous_format)
    return x.reshape(groups, channels // groups, batch * positions)


def from_rows(rows: Tensor, input: Tensor) -> Tensor:
    """(G, g, N·S) as (N, C, *S): a view."""
    groups, size, _ = rows.shape
    batch, positions = input.shape[0], input.shape[2:].numel()
    return rows.reshape(groups, size, batch, positions).permute(2, 0, 1, 3).reshape(input.shape)


class _Covariance(torch.autograd.Function):
    """Σ = X·diag(w)·Xᵀ / n of centered rows, summed in float64.

    The directions of little variance are what whitening enlarges, so they must not be rounding. Measured, 16 channels
    with eigenvalues of 1 and 10⁻⁵, 25,000 values: sums of float32 cost 2e-3 of the output, of float64 1.5e-5, which is
    what the rounding of the output's own products costs. float32 would save a tenth of a training step's time.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor | None, n: Tensor) -> Tensor:
        wide = x.to(n.dtype)
        return per_one((wide if w is None else wide * w) @ wide.mT, n)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # dX = (dΣ + dΣᵀ)·X·diag(w) / n, in the working dtype: nothing divides by a difference here.
        x, w, n = ctx.saved_tensors
        dx = per_one(grad + grad.mT, n).to(x.dtype) @ x
        return dx if w is None else dx * w.to(x.dtype), None, None


def _congruent(vectors: Tensor, inner: Tensor) -> Tensor:
    """U·M·Uᵀ."""
    return vectors @ inner @ vectors.mT


class _Lyapunov(torch.autograd.Function):
    """The solution X of X·W + W·X = R for symmetric positive W, whose eigenvectors and eigenvalues are given.

    Differentiable in W and R as often as you like, because its gradient is the solution of such an equation again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(W: Tensor, R: Tensor, vectors: Tensor, values: Tensor) -> Tensor:
        inner = _congruent(vectors.mT, R) / (values.unsqueeze(-1) + values.unsqueeze(-2))
        return _congruent(vectors, inner)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        W, _, vectors, values = inputs
        ctx.save_for_backward(W, vectors, values, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        W, vectors, values, X = ctx.saved_tensors
        Y = _Lyapunov.apply(W, grad, vectors, values)  # type: ignore[no-untyped-call]
        return -(X.mT @ Y + Y @ X.mT), Y, None, None


class _InverseRoot(torch.autograd.Function):
    r"""W = Σ^{-1/2} by eigenvectors, with a gradient that stays finite where eigenvalues are equal.

    Autograd's gradient of the eigenvectors divides by λi − λj. The function itself has a derivative everywhere: with
    Σ = UΛUᵀ and K_ij the divided difference of λ^{-1/2},

        dΣ = U·(K ∘ (Uᵀ dW U))·Uᵀ,    K_ij = (λi^{-1/2} − λj^{-1/2}) / (λi − λj) = −1 / (√λi·√λj·(√λi + √λj)).

    For second derivatives the same is written as a function of W: W² = Σ⁻¹ gives dW·W + W·dW = −W²·dΣ·W².
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(covariance: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        # LAPACK refuses the whole batch for one NaN: a group that has one is computed as another, and marked.
        finite = covariance.isfinite().flatten(-2).all(-1)[..., None, None]
        identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        values, vectors = torch.linalg.eigh(torch.where(finite, covariance, 0.0) + eps * identity)
        # No eigenvalue is below ε but by rounding.
        roots = values.clamp(min=eps).rsqrt()
        W = (vectors * roots.unsqueeze(-2)) @ vectors.mT
        return torch.where(finite, W, torch.nan), vectors, roots

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, vectors, roots = output
        ctx.mark_non_differentiable(vectors, roots)
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        W, vectors, roots = ctx.saved_tensors
        grad = (grad + grad.mT) / 2
        if torch.is_grad_enabled():
            square = W @ W
            return -square @ _Lyapunov.apply(W, grad, vectors, roots) @ square, None  # type: ignore[no-untyped-call]
        left, right = roots.unsqueeze(-1), roots.unsqueeze(-2)
        K = -(left * right).square() / (left + right)
        return _congruent(vectors, K * _congruent(vectors.mT, grad)), None


def _newton(covariance: Tensor, eps: float, iterations: int) -> Tensor:
    """W ≈ (Σ + εI)^{-1/2}: P ← (3P − P³·S) / 2 from P = I with S = (Σ + εI) / trace, and W = P / √trace.

    Computed with Q = P·S beside it, P ← T·P and Q ← Q·T with T = (3I − P·Q) / 2: the same steps, but what rounding adds
    does not grow. Written as above it grows from step to step once W has converged: 30 steps ended in NaN.
    """
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    regular = covariance + eps * identity
    trace = (regular * identity).sum((-2, -1), keepdim=True)
    Q = regular / trace
    P = step = (3 * identity - Q) / 2
    for _ in range(iterations - 1):
        Q = Q @ step
        step = (3 * identity - P @ Q) / 2
        P = step @ P
    return P * trace.rsqrt()


def inverse_root(covariance: Tensor, eps: float, iterations: int | None) -> Tensor:
    """(Σ + εI)^{-1/2} of (G, g, g): exactly, or by so many steps of Newton's iteration."""
    if iterations is not None:
        return _newton(covariance, eps, iterations)
    W: Tensor = _InverseRoot.apply(covariance, eps)[0]  # type: ignore[no-untyped-call]
    return W


class Whitening:
    """How W is had of a covariance, and what follows: γ·W·(x − μ) + β."""

    def __init__(
        self, groups: int, eps: float, iterations: int | None, weight: Tensor | None, bias: Tensor | None
    ) -> None:
        self.groups, self.eps, self.iterations = groups, eps, iterations
        self.weight, self.bias = weight, bias

    def apply(self, x: Tensor, covariance: Tensor) -> Tensor:
        """γ·W·x + β of centered rows: one product."""
        W = inverse_root(covariance, self.eps, self.iterations)
        shape = (*x.shape[:2], 1)
        if self.weight is not None:
            W = W * self.weight.to(W.dtype).reshape(shape)
        W = W.to(x.dtype)
        return W @ x if self.bias is None else torch.baddbmm(self.bias.to(x.dtype).reshape(shape), W, x)


def whiten(input: Tensor, mask: Tensor | None, whitening: Whitening) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By the batch's own statistics: (z, mean (C,), covariance (G, g, g), count ())."""
    wide = statistics_dtype(input)
    x = to_rows(input, whitening.groups)
    w = None if mask is None else mask.to(wide).reshape(1, 1, x.shape[2])
    n = torch.full((), torch.sym_float(x.shape[2]), dtype=wide, device=x.device) if w is None else w.sum()
    x, mean = centered(x, w, n.reshape(1, 1, 1), (2,))
    covariance: Tensor = _Covariance.apply(x, w, n)  # type: ignore[no-untyped-call]
    return from_rows(whitening.apply(x, covariance), input), mean.flatten(), covariance, n


def whiten_by(
    input: Tensor, mask: Tensor | None, mean: Tensor, covariance: Tensor, whitening: Whitening
) -> Tensor:
    """By given statistics, (C,) and (G, g, g), which are constants."""
    wide = statistics_dtype(input)
    x = to_rows(input, whitening.groups)
    if mask is not None:
        x = torch.where(mask.reshape(1, 1, x.shape[2]) > 0, x, 0.0)
    x = less(x, mean.to(wide).reshape(*x.shape[:2], 1))
    return from_rows(whitening.apply(x, covariance.to(wide)), input)


def update_running_(
    running_mean: Tensor,
    running_cov: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    mean: Tensor,
    covariance: Tensor,
    n: Tensor,
    *,
    skip_nonfinite: bool,
) -> None:
    """running ← running + momentum·(batch − running), with the unbiased covariance, n / (n − 1) of the batch's.

    momentum None is the plain average, 1 / num_batches_tracked. An empty batch moves nothing, one value no covariance,
    and with `skip_nonfinite` a group whose statistics are not finite neither.
    """
    factor: Tensor | float = 0.0 if momentum is None else momentum
    if momentum is None and num_batches_tracked is not None:
        factor = 1.0 / num_batches_tracked.to(n.dtype)
    unbiased = covariance * (n / torch.where(n > 1, n - 1, 1.0))
    new_mean = (running_mean.to(n.dtype) * (1 - factor) + mean * factor).to(running_mean.dtype)
    new_cov = (running_cov.to(n.dtype) * (1 - factor) + unbiased * factor).to(running_cov.dtype)
    keep_mean, keep_cov = n <= 0, n <= 1
    if skip_nonfinite:
        groups = covariance.shape[0]
        bad = ~(new_cov.isfinite().flatten(1).all(1) & new_mean.reshape(groups, -1).isfinite().all(1))
        keep_mean = keep_mean | bad.repeat_interleave(covariance.shape[1])
        keep_cov = keep_cov | bad.reshape(-1, 1, 1)
    running_mean.copy_(torch.where(keep_mean, running_mean, new_mean))
    running_cov.copy_(torch.where(keep_cov, running_cov, new_cov))
