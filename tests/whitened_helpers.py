"""Whitening as the papers have it, one group of channels after the other, and what its tests are run on."""

from typing import Any

import torch
from helpers import SLOPE
from torch import Tensor
from torch.nn import functional as F

from batchnorm import WhitenedBatchNorm

F64 = torch.float64
METHODS = ["zca", "newton"]


def root(covariance: Tensor, eps: float, method: str, iterations: int) -> Tensor:
    """(Σ + εI)^{-1/2} of one matrix, as the two papers have it; autograd differentiates it."""
    regular = covariance + eps * torch.eye(len(covariance), dtype=F64)
    if method == "zca":
        values, vectors = torch.linalg.eigh(regular)
        return vectors @ torch.diag(values**-0.5) @ vectors.T
    trace = torch.trace(regular)
    P = torch.eye(len(covariance), dtype=F64)
    for _ in range(iterations):
        P = 1.5 * P - 0.5 * torch.linalg.matrix_power(P, 3) @ (regular / trace)
    return P / trace.sqrt()


def activate(z: Tensor, name: str | None) -> Tensor:
    if name == "leaky_relu":
        return F.leaky_relu(z, SLOPE)
    return z if name is None else getattr(F, name)(z)


def expected(x: Tensor, layer: WhitenedBatchNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """(γ·W(x − μ) + β, mean, covariance) of float64 input, one group of channels after the other."""
    rows = x.movedim(1, -1).reshape(-1, x.shape[1])
    found = []
    for start in range(0, x.shape[1], layer.group_size):
        part = rows[:, start : start + layer.group_size]
        mean = part.mean(0)
        covariance = (part - mean).T @ (part - mean) / len(rows)
        W = root(covariance, layer.eps, layer.method, layer.iterations)
        found.append(((part - mean) @ W.T, mean, covariance))
    y, means, covariances = zip(*found, strict=True)
    z = torch.cat(y, 1) * weight + bias
    z = z.reshape(*x.movedim(1, -1).shape).movedim(-1, 1)
    return z, torch.cat(means), torch.stack(covariances)


def made(channels: int = 6, **options: Any) -> WhitenedBatchNorm:
    options = {"group_size": 3, "eps": 1e-3, "dtype": F64, "negative_slope": SLOPE} | options
    layer = WhitenedBatchNorm(channels, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 1.5)
    return layer


def correlated(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    """Channels that are mixtures of others, with offsets."""
    mix = torch.randn(shape[1], shape[1], dtype=dtype)
    return torch.einsum("cd,nd...->nc...", mix, torch.randn(shape, dtype=dtype)) + 3
