"""How much of a batch norm's input is what padding has become."""

import torch
from torch import Tensor

__all__ = ["padded_share"]


def padded_share(input: Tensor) -> float:
    """The share of positions that padding fills, for (N, C, L): at the ends of samples, alike, of different lengths.

    A padded step is the same vector of channels in every sample (a zero that went through a layer without mixing
    positions is its bias), and repeated up to the end. One sample has to be full, or less padded than another: an end
    that is alike everywhere is data.
    """
    if input.dim() != 3 or input.shape[0] < 2 or input.shape[2] < 2:
        return 0.0
    x = input.detach()
    # How many steps at the end of each sample equal its last step.
    same = (x == x[:, :, -1:]).all(1)
    lengths = same.flip(1).long().cumprod(1).sum(1)
    ends = x[:, :, -1]
    padded = lengths > 1
    if not padded.any():
        return 0.0
    # The common last step of those that repeat it.
    first = ends[padded.nonzero()[0, 0]]
    alike = (ends == first).all(1) & padded
    lengths = torch.where(alike, lengths, 0)
    if int(alike.sum()) < 2 or int(lengths.max()) == int(lengths.min()):
        return 0.0
    return float(lengths.sum()) / (x.shape[0] * x.shape[2])
