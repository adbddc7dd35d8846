"""How well the mean of each channel is known: the rule that ends a pass early."""

import math

import torch
from torch import Tensor

from batchnorm.stats._moments import Pool

__all__ = ["CHECKED_FROM", "block_scatter", "precision"]

# Fewer blocks say too little about how one stretch of the stream differs from the next.
CHECKED_FROM = 16
_NORMAL = 1.959964  # 95 %, two sides


def block_scatter(pool: Pool) -> Tensor:
    """Σ over this process's blocks of W²(m − mean)², (C,), about the mean over all processes."""
    total = torch.zeros_like(pool.values.mean)
    for block in pool.blocks:
        total = total + (block.count * (block.mean - pool.values.mean)).square()
    return total


def precision(pool: Pool, scatter: Tensor, blocks: int, eps: float) -> tuple[float, float]:
    """Half the 95 % interval of the mean in units of √(var + ε), the largest of the channels; and the design effect.

    With sample means s of weight w (the number of its positions), W = Σw: the mean is Σws/W and its variance
    V = Σw²(s − mean)²/W² for independent samples. `blocks` stretches of the stream with weight W and mean m show how
    far from independent they are: B = K/(K − 1)·ΣW²(m − mean)²/W². The design effect of the layer is ΣB/σ² over ΣV/σ²
    (sums over channels), at least 1, and multiplies V. A single sample: infinite.
    """
    mean, total = pool.values.mean, pool.values.count
    weight = torch.where(total > 0, total, 1.0).square()
    # W²/Σw² is the number of samples, where they weigh the same. One says nothing about the next.
    if float(pool.samples.count) > 0 and float(total.square() / pool.samples.count) < 1.0 + 1e-6:
        return math.inf, 1.0
    unit = pool.values.biased_var + eps
    single = (pool.samples.m2 + pool.samples.count * (pool.samples.mean - mean).square()) / weight / unit
    effect = 1.0
    if blocks > 1:
        stretch = scatter / weight / unit * blocks / (blocks - 1)
        known = single.sum()
        effect = max(1.0, float(stretch.sum() / known)) if known > 0 else 1.0
    return _NORMAL * math.sqrt(float(single.max()) * effect), effect
