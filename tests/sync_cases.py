"""What the tests of SyncBatchNorm compute: cases, a process's share of one, and one process with the whole batch."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.policies import sync

CHANNELS = 5
# Samples of each process; the first two, three or four count.
SIZES = {"even": (4, 4, 4, 4), "uneven": (3, 6, 1, 2), "empty": (5, 0, 3, 2), "empty first": (0, 6, 3, 2)}


@dataclass(frozen=True)
class Case:
    """A layer, its input and what it is called with."""

    sizes: str = "uneven"
    tail: tuple[int, ...] = (4, 3)
    offset: float = 0.0
    dtype: torch.dtype = torch.float32
    activation: str | None = None
    residual: bool = False
    mask: str = ""
    channels_last: bool = False
    momentum: float | None = 0.1
    affine: bool = True
    steps: int = 1
    backend: str | None = None

    def tensors(self, step: int, world: int) -> list[dict[str, Tensor | None]]:
        """What each process has: input, gradient of the output, residual, mask. σ is 1 in no channel."""
        generator = torch.Generator().manual_seed(17 + step)
        found = []
        spread = torch.rand(CHANNELS, generator=generator) + 0.5
        for rank, size in enumerate(SIZES[self.sizes][:world]):
            shape = (size, CHANNELS, *self.tail)
            column = (1, CHANNELS, *[1] * len(self.tail))
            x, dy, residual = torch.randn(3, *shape, generator=generator)
            x = (x + 0.3 * rank + self.offset) * spread.view(column) * (1 + 0.5 * rank)
            weights = torch.rand(size, *self.tail, generator=generator)
            mask = {"": None, "bool": weights > 0.4, "weights": (4 * weights).round(), "last": weights < 2}[
                self.mask
            ]
            if self.mask == "last" and rank == world - 1:  # a process that has nothing valid
                mask = torch.zeros_like(weights, dtype=torch.bool)
            x, dy, residual = (each.to(self.dtype) for each in (x, dy, residual))
            if self.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            found.append({"x": x, "dy": dy, "residual": residual if self.residual else None, "mask": mask})
        return found

    def load(self, layer: nn.Module) -> nn.Module:
        """The same parameters and running statistics everywhere."""
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for each in layer.parameters():
                each.copy_(torch.rand(each.shape, generator=generator) + 0.5)
        return layer


CASES = {
    "even 2d input": Case("even", ()),
    "uneven": Case(),
    "uneven 1d": Case(tail=(7,)),
    "uneven 3d": Case(tail=(2, 3, 2)),
    "one empty": Case("empty"),
    "first empty": Case("empty first", offset=100.0),
    "offset 100": Case(offset=1e2),
    "offset 10000": Case(offset=1e4, steps=3),
    "mask": Case(mask="bool"),
    "weights": Case(mask="weights", activation="silu", residual=True),
    "one masked out": Case(mask="last", steps=2),
    "residual relu": Case(activation="relu", residual=True),
    "gelu": Case(activation="gelu"),
    "channels-last": Case(channels_last=True, activation="relu"),
    "bfloat16": Case(dtype=torch.bfloat16, activation="relu", residual=True),
    "float64": Case(dtype=torch.float64, offset=10.0),
    "momentum None": Case(momentum=None, steps=3),
    "no parameters": Case(affine=False),
    "reference": Case(backend="reference", activation="leaky_relu"),
}


def run_case(
    case: Case, rank: int, world: int, device: str, layer: nn.Module | None = None
) -> dict[str, Any]:
    """A few steps on the process's share: outputs, gradients, buffers."""
    wide = case.dtype if case.dtype == torch.float64 else torch.float32
    if layer is None:
        layer = case.load(
            batchnorm.SyncBatchNorm(
                CHANNELS,
                momentum=case.momentum,
                affine=case.affine,
                activation=case.activation,
                backend=case.backend,
                device=device,
                dtype=wide,
            )
        )
    steps = []
    for step in range(case.steps):
        mine = {k: None if v is None else v.to(device) for k, v in case.tensors(step, world)[rank].items()}
        x, dy, residual, mask = (mine[name] for name in ("x", "dy", "residual", "mask"))
        x.requires_grad_()
        wanted = [x, *layer.parameters()]
        if residual is not None:
            wanted.append(residual.requires_grad_())
        y = layer(x, residual=residual, mask=mask)
        steps.append([y.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(y, wanted, dy))])
    return {"steps": steps, "buffers": {name: value.cpu() for name, value in layer.named_buffers()}}


def cat(tensors: list[Tensor | None]) -> Tensor | None:
    """The whole batch of its parts."""
    return None if tensors[0] is None else torch.cat(tensors)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Within a part of the largest value."""
    assert got.shape == want.shape
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max() + 1e-300


def whole(case: Case, world: int) -> dict[str, Any]:
    """The plain layer of this package on the whole batch."""
    kind = {
        0: batchnorm.BatchNorm1d,
        1: batchnorm.BatchNorm1d,
        2: batchnorm.BatchNorm2d,
        3: batchnorm.BatchNorm3d,
    }
    wide = case.dtype if case.dtype == torch.float64 else torch.float32
    layer = kind[len(case.tail)](
        CHANNELS, momentum=case.momentum, affine=case.affine, activation=case.activation, dtype=wide
    )
    joined = copy.copy(case)
    parts = {step: case.tensors(step, world) for step in range(case.steps)}
    object.__setattr__(
        joined,
        "tensors",
        lambda step, world: [{name: cat([part[name] for part in parts[step]]) for name in parts[step][0]}],
    )
    return run_case(joined, 0, 1, "cpu", case.load(layer))


@contextmanager
def gathering(most: int) -> Iterator[None]:
    """Another number of processes above which sums are exchanged."""
    before, sync.GATHER_AT_MOST = sync.GATHER_AT_MOST, most
    try:
        yield
    finally:
        sync.GATHER_AT_MOST = before
