"""How much of a batch norm's input is what padding has become."""

import torch
from torch import Tensor

__all__ = ["padded_share"]

# Of the steps that equal the padding, so many have to stand at ends: a value that is there in the middle, too, is data.
_AT_ENDS = 0.9
# The same vector at two places of a convolution's output differs by its rounding.
_ROUNDING = 1e-5
# Candidates for the padding, in the order of the samples.
_TRIED = 8


def padded_share(input: Tensor, samples: int) -> float:
    """The share of positions that padding fills: in (N, C, L), and in (N·L, C), the rows of `samples` sequences.

    A padded step is the same vector of channels in every sample (a zero that went through layers without mixing
    positions is a bias), repeated up to an end, in stretches of different lengths, and is found nowhere else. Images
    are not looked at: a border that they share is theirs.
    """
    x = input.detach()
    if x.dim() == 3:
        return _in_sequences(x)
    rows = x.shape[0]
    if x.dim() == 2 and samples > 1 and rows > samples and rows % samples == 0:
        length = rows // samples
        by_sample = x.reshape(samples, length, -1).transpose(1, 2)
        by_step = x.reshape(length, samples, -1).permute(1, 2, 0)
        return max(_in_sequences(by_sample), _in_sequences(by_step))
    return 0.0


def _in_sequences(x: Tensor) -> float:
    if x.shape[0] < 2 or x.shape[2] < 2 or not x.numel():
        return 0.0
    return max(_at_end(x), _at_end(x.flip(2)))


def _at_end(x: Tensor) -> float:
    n, _, length = x.shape
    last = x[:, :, -1]
    near = _ROUNDING * x.abs().amax((0, 2))  # of each channel
    stands = ((last - x[:, :, -2]).abs() <= near).all(1)  # the last two steps are equal
    candidates = stands.nonzero().flatten()[:_TRIED]
    if not len(candidates):
        return 0.0
    agree = torch.stack([((last - last[each]).abs() <= near).all(1) & stands for each in candidates.tolist()])
    chosen = last[candidates[agree.sum(1).argmax()]]
    equal = ((x - chosen[:, None]).abs() <= near[:, None]).all(1)
    # How many steps at the end of each sample are padding. A sample that is nothing else is an empty one.
    lengths = equal.flip(1).long().cumprod(1).sum(1)
    partly = (lengths > 1) & (lengths < length)
    if int(partly.sum()) < 2 or int(lengths.max()) == int(lengths.min()):
        return 0.0
    inside = float(lengths.sum())
    return inside / (n * length) if inside >= _AT_ENDS * float(equal.sum()) else 0.0
