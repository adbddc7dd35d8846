"""What the tests of `accumulate` share: the update by a whole batch, by the formula, and how near to it is near."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


def after(layer: nn.Module, batches: list[Tensor], masks: list[Tensor] | None = None, copies: int = 1) -> Any:
    """The layer's buffers after one update by all batches together, by the formula, value after value in float64."""
    own = copy.deepcopy(layer)
    rows, weights = [], []
    for number, x in enumerate(batches):
        channels_last = x.double().movedim(1, -1)
        w = torch.ones(channels_last.shape[:-1]) if masks is None else masks[number]
        rows.append(channels_last.reshape(-1, x.shape[1]))
        weights.append(w.double().reshape(-1, 1))
    x, w = torch.cat(rows), torch.cat(weights)
    x = torch.where(w > 0, x, 0.0)
    n = w.sum()
    mean = (w * x).sum(0) / n
    mean = mean + (w * (x - mean)).sum(0) / n
    m2 = (w * (x - mean) ** 2).sum(0)
    n, m2 = n * copies, m2 * copies
    own.num_batches_tracked += 1
    m = 1 / own.num_batches_tracked.double() if own.momentum is None else own.momentum
    own.running_mean.copy_(own.running_mean.double() * (1 - m) + m * mean)
    own.running_var.copy_(own.running_var.double() * (1 - m) + m * m2 / (n - 1))
    return own.state_dict()


def same(layer: nn.Module, expected: dict[str, Tensor]) -> None:
    """1e-12 in float64, 2 units in the last place in float32, and the same counter."""
    state = layer.state_dict()
    for name in ("running_mean", "running_var"):
        mine, other = state[name], expected[name].to(state[name])
        if mine.dtype == torch.float64:
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
        else:
            away = (mine.view(torch.int32).long() - other.view(torch.int32).long()).abs().max()
            assert away <= 2, (name, away)
    assert state["num_batches_tracked"] == expected["num_batches_tracked"]


def parts(shape: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [(torch.randn(size, *shape[1:]) * (1 + i) + 3 * i).to(dtype) for i, size in enumerate(sizes)]
