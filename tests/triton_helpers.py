"""What the tests of the Triton kernels share. They run on a GPU where there is one, else in triton's interpreter."""

import importlib.util
from typing import Any

import pytest
import torch
from helpers import RELU_LIKE, SLOPE, lay_out
from torch import Tensor

from batchnorm import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-3
# Relative to the largest value: float32 arithmetic, and the rounding of the output.
ROOM = {
    torch.float64: 1e-11,
    torch.float32: 1e-6,
    # The interpreter cuts bfloat16 off where a GPU rounds.
    torch.bfloat16: 2.0 ** (-8 if DEVICE == "cuda" else -7) * 1.02,
    torch.float16: 2.0**-11 * 1.02,
}

marks = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.usefixtures("_poisoned_memory"),
    # Interpreted, an overflow is numpy's, and a warning of numpy's.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
if DEVICE == "cuda":
    marks.append(pytest.mark.gpu)


class Data:
    """Random arguments of a call, with NaN in all of them where the mask is 0."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        layout: str = "contiguous",
        residual: bool = False,
        mask: str | None = None,
        parameters: tuple[int, ...] | None = None,
    ) -> None:
        self.mask = make_mask(mask, shape)
        hole = None if self.mask is None else (self.mask == 0).unsqueeze(1)

        def draw(scale: float, shift: float) -> Tensor:
            values = torch.randn(shape) * scale + shift
            if hole is not None:
                values = values.masked_fill(hole, float("nan"))
            return lay_out(values.to(dtype), layout).to(DEVICE)

        self.hole = None if hole is None else hole.expand(shape).to(DEVICE)
        self.x, self.dy, r = draw(2, 1), draw(1, 0.5), draw(1, 0)
        self.r = r if residual else None
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.weight, self.bias = (torch.randn(parameters or (shape[1],)).to(DEVICE, wide) for _ in range(2))
        self.mask = None if self.mask is None else self.mask.to(DEVICE)

    def call(self, wide: bool = False) -> tuple[Any, ...]:
        tensors = (self.x, self.weight, self.bias, self.r)
        return tuple(t.double() if wide and t is not None else t for t in tensors)


def make_mask(kind: str | None, shape: tuple[int, ...]) -> Tensor | None:
    """(N, *S), about a third of it 0: bool, small numbers, or weights over four orders of magnitude."""
    if kind is None:
        return None
    shape = (shape[0], *shape[2:])
    valid = torch.rand(shape) < 0.7
    valid.view(-1)[0] = True
    if kind == "bool":
        return valid
    if kind == "frequencies":
        return torch.randint(1, 5, shape) * valid
    return torch.rand(shape) * 10 ** torch.randint(-3, 2, shape).double() * valid


def kept_of(saved: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """What backward is given: nothing, bits, or the residual."""
    return saved if residual is None or activation in (None, *RELU_LIKE) else residual


def near(mine: Tensor, truth: Tensor, room: float, name: str = "") -> None:
    """Assert that no value is off by more than `room` of the largest one."""
    assert mine.shape == truth.shape, name
    if truth.numel():
        assert not mine.isnan().any(), name
        scale = truth.abs().max().clamp_min(1e-300)
        assert ((mine.double() - truth.double()).abs().max() / scale).item() <= room, name


def agree(
    launch: Any, data: Data, activation: str | None, room: float, groups: int = 1, primitives: bool = True
) -> None:
    """`forward` and `backward`, and the four primitives, each against the reference on the same values in float64."""
    x, weight, bias, r = data.call()
    wide, dy, mask, rule = data.call(wide=True), data.dy, data.mask, (activation, SLOPE)
    y, mean, var, count, saved = launch.forward(*data.call(), mask, groups, EPS, *rule)
    truth = reference.forward(*wide, mask, groups, EPS, *rule)
    exact = x.dtype == torch.float64
    near(y, truth[0], room, "output")
    assert y.stride() == torch.empty_like(x).stride()
    spread = truth[2].sqrt().max() + truth[1].abs().max() * (1e-16 if exact else 1e-8)
    if mask is not None and mask.is_floating_point():
        # The first pilot may weigh a thousandth of the rest, and be as far from the mean as the values are.
        spread = torch.maximum(spread, x.double().nan_to_num().abs().max())
    assert ((mean - truth[1]).abs().max() / spread).item() <= (1e-13 if exact else 3e-7), "mean"
    near(var, truth[2], 1e-12 if exact else 1e-6, "var")
    near(count, truth[3], 1e-13 if exact or mask is None or mask.dtype != torch.float64 else 1e-6, "count")
    k, kr = kept_of(saved, r, activation), kept_of(truth[4], wide[3], activation)
    # An element within a rounding of a kink may fall on either side: gradients are compared where both agree.
    if activation in (*RELU_LIKE, "hardswish"):
        if r is not None and activation in RELU_LIKE:
            same = launch.unpack(saved, x) == reference.unpack(truth[4], x)
            same = same if data.hole is None else same | data.hole
            assert same.double().mean() > 0.99
        else:
            z = reference.normalize(
                wide[0], truth[1], (truth[2] + EPS).rsqrt(), *wide[1:], mask, None, SLOPE
            )[0]
            same = torch.stack([(z - kink).abs() > 1e-5 for kink in (0, 6, 3, -3)]).all(0)
        dy = torch.where(same, dy, torch.zeros_like(dy))
    gradients = launch.backward(dy, x, mean, var, count, weight, bias, k, r is not None, mask, EPS, *rule)
    expected = reference.backward(
        dy.double(), wide[0], *truth[1:4], *wide[1:3], kr, r is not None, mask, EPS, *rule
    )
    for mine, other, name in zip(gradients, expected, ("dx", "dweight", "dbias", "dresidual"), strict=True):
        near(mine, other, (4 if x.element_size() > 2 else 1.1) * room, name)
    for value in (y, gradients[0], *([gradients[3]] if r is not None else [])):
        assert data.hole is None or (value[data.hole] == 0).all()
    if primitives:
        _agree_on_primitives(launch, data, dy, k, kr, truth, rule, groups, room)


def _agree_on_primitives(
    launch: Any, data: Data, dy: Tensor, k: Tensor, kr: Tensor, truth: Any, rule: Any, groups: int, room: float,
) -> None:  # fmt: skip
    x, weight, bias, r = data.call()
    wide, mask = data.call(wide=True), data.mask
    mean, var, count = truth[1:4]
    found = launch.moments(x, mask, groups)
    near(found[1], var * count, 1e-6, "m2")
    # Statistics that are not those of the batch, as in eval mode.
    other_mean, invstd = mean + 0.3, (2 * var + EPS).rsqrt()
    again, _ = launch.normalize(x, other_mean, invstd, weight, bias, r, mask, *rule)
    near(
        again, reference.normalize(wide[0], other_mean, invstd, *wide[1:], mask, *rule)[0], room, "normalize"
    )
    tail = (weight, bias, k, r is not None, mask)
    wide_tail = (*wide[1:3], kr, r is not None, mask)
    if rule[0] in (*RELU_LIKE, "hardswish") and (r is None or rule[0] == "hardswish"):
        other_mean, invstd = mean, (var + EPS).rsqrt()  # the elements near a kink are known for these
    sums = launch.grad_sums(dy, x, other_mean, invstd, *tail, *rule)
    true_sums = reference.grad_sums(dy.double(), wide[0], other_mean, invstd, *wide_tail, *rule)
    # A sum may be far below its terms, whose roundings it has.
    terms = dy.double().nan_to_num().abs().max() * (x.numel() / max(1, x.shape[1])) ** 0.5
    for mine, other in zip(sums, true_sums, strict=True):
        assert (mine - other).abs().max() <= 8e-6 * torch.maximum(terms, other.abs().max()), "sums"
    dx, dr = launch.grad_input(dy, x, other_mean, invstd, *tail, *true_sums, count, *rule)
    true_dx, true_dr = reference.grad_input(
        dy.double(), wide[0], other_mean, invstd, *wide_tail, *true_sums, count, *rule
    )
    near(dx, true_dx, (4 if x.element_size() > 2 else 1.1) * room, "grad_input")
    near(dr, true_dr, (4 if x.element_size() > 2 else 1.1) * room, "grad_residual")
