"""VirtualBatchNorm against a slow and obvious implementation that builds the whole graph, reference and samples."""

from typing import Any

import pytest
import torch
from helpers import ACTIVATIONS, SLOPE, lay_out, leaf, same_bits
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn import functional as F

import batchnorm
from batchnorm import InputError, InputTypeError, ModelError, VirtualBatchNorm, reference_batch
from batchnorm.ops.composed import centered

NAN = float("nan")
F64 = torch.float64
SHAPES = [(5, 3), (5, 3, 4), (4, 3, 2, 3), (3, 3, 2, 2, 2)]


def activate(z: Tensor, name: str | None) -> Tensor:
    if name == "leaky_relu":
        return F.leaky_relu(z, SLOPE)
    return z if name is None else getattr(F, name)(z)


def plain(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm by the batch's own statistics, and those."""
    rows = x.movedim(1, -1)
    flat = rows.reshape(-1, x.shape[1])
    mean, var = flat.mean(0), flat.var(0, correction=0)
    return ((rows - mean) / (var + eps).sqrt() * weight + bias).movedim(-1, 1), mean, var


def virtual(
    reference: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Both outputs: each sample by k samples of the reference and one of its own, moments and second moments."""
    first, mean, var = plain(reference, weight, bias, eps)
    k, found = len(reference), []
    for sample in x:
        rows = sample.movedim(0, -1).reshape(-1, x.shape[1])
        own, square = rows.mean(0), rows.square().mean(0)
        merged = (k * mean + own) / (k + 1)
        second = (k * (var + mean.square()) + square) / (k + 1)
        std = (second - merged.square() + eps).sqrt()
        rows = (rows - merged) / std * weight + bias
        found.append(rows.reshape(sample.movedim(0, -1).shape).movedim(-1, 0))
    return first, torch.stack(found)


def made(channels: int = 3, **options: Any) -> VirtualBatchNorm:
    layer = VirtualBatchNorm(channels, **{"dtype": F64, "negative_slope": SLOPE} | options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 1.5)
    return layer


def shown(layer: VirtualBatchNorm, reference: Tensor) -> VirtualBatchNorm:
    with torch.no_grad(), reference_batch(layer):
        layer(reference)
    return layer


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_papers_formulas(
    shape: tuple[int, ...], activation: str | None, with_residual: bool, training: bool
) -> None:
    layer = made(activation=activation).train(training)
    reference = torch.randn(7, *shape[1:], dtype=F64) * 2 + 1
    x, r, dy = torch.randn(3, *shape, dtype=F64)
    d_reference = torch.randn_like(reference)
    results = []
    for ours in (True, False):
        a, b, c = leaf(reference), leaf(x), leaf(r)
        weight, bias = leaf(layer.weight), leaf(layer.bias)
        added = c if with_residual else None
        if ours:
            parameters = {"weight": weight, "bias": bias}
            with reference_batch(layer):
                first = functional_call(layer, parameters, (a,))
            y = functional_call(layer, parameters, (b, added))
        else:
            first, y = virtual(a, b, weight, bias)
            first = activate(first, activation)
            y = activate(y if added is None else y + added, activation)
        wanted = [a, b, weight, bias, *([c] if with_residual else [])]
        results.append((first, y, *torch.autograd.grad([first, y], wanted, [d_reference, dy])))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-11)
    _, mean, var = plain(reference, layer.weight, layer.bias)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var)
    assert layer.num_batches_tracked == 7


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_derivatives_by_differences_through_both_passes(masked: bool) -> None:
    layer = made(2, activation="silu")
    reference = torch.randn(3, 2, 3, dtype=F64, requires_grad=True)
    x, r = (torch.randn(2, 2, 3, dtype=F64, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[1, 0.5, 0], [2, 1, 1]]) if masked else None
    other = torch.tensor([[1, 2, 0], [0, 0, 0], [1, 1, 0.5]]) if masked else None

    def call(reference: Tensor, x: Tensor, r: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        parameters = {"weight": weight, "bias": bias}
        with reference_batch(layer):
            first = functional_call(layer, parameters, (reference, None, other))
        return first, functional_call(layer, parameters, (x, r, mask))

    arguments = (reference, x, r, leaf(layer.weight), leaf(layer.bias))
    assert gradcheck(call, arguments)
    assert gradgradcheck(call, arguments)


def test_samples_do_not_depend_on_one_another() -> None:
    layer = shown(made(dtype=torch.float32), torch.randn(8, 3, 5, 5))
    x = torch.randn(4, 3, 5, 5)
    y = layer(x)
    torch.testing.assert_close(y, torch.cat([layer(each[None]) for each in x]))
    x[0] = NAN
    assert same_bits(layer(x)[1:], y[1:])
    a = leaf(torch.randn(4, 3, 5, 5))
    (dx,) = torch.autograd.grad(layer(a)[2], a, torch.randn(3, 5, 5))
    assert [each.any().item() for each in dx] == [False, False, True, False]


def test_a_large_reference_is_a_frozen_batch_norm_and_none_is_refused() -> None:
    frozen = nn.BatchNorm2d(3, dtype=F64)
    frozen(torch.randn(9, 3, 4, 4, dtype=F64) * 2 + 1)
    layer = VirtualBatchNorm(3, dtype=F64)
    x = torch.randn(4, 3, 4, 4, dtype=F64)
    state = frozen.state_dict()
    layer.load_state_dict(state | {"num_batches_tracked": torch.tensor(10**9)}, strict=True)
    torch.testing.assert_close(layer(x), frozen.eval()(x), rtol=1e-7, atol=1e-7)
    layer.load_state_dict(state | {"num_batches_tracked": torch.tensor(0)})
    with pytest.raises(ModelError, match=r"no reference batch.*with batchnorm\.reference_batch"):
        layer(x)
    layer.load_state_dict(state)  # one batch seen
    torch.testing.assert_close(
        layer.eval()(x[:1]), by_hand(x[:1], frozen.running_mean, frozen.running_var, 1)
    )


def by_hand(x: Tensor, mean: Tensor, var: Tensor, k: int) -> Tensor:
    """One sample, by a reference of k."""
    rows = x.movedim(1, -1).reshape(-1, x.shape[1])
    merged = (k * mean + rows.mean(0)) / (k + 1)
    second = (k * (var + mean.square()) + rows.square().mean(0)) / (k + 1)
    z = (x.movedim(1, -1) - merged) / (second - merged.square() + 1e-5).sqrt()
    return z.movedim(-1, 1)


def test_offsets_cost_no_digits() -> None:
    """float32, means of 10⁴ σ; E[x²] − E[x]² would have nothing left."""
    layer, exact = made(dtype=torch.float32), made()
    exact.load_state_dict(layer.state_dict())
    reference, x = torch.randn(16, 3, 9, 9) + 1e4, torch.randn(4, 3, 9, 9) + 1e4
    a, b = leaf(x), leaf(x.double())
    results = []
    for one, sample, ref in ((layer, a, leaf(reference)), (exact, b, leaf(reference.double()))):
        with reference_batch(one):
            one(ref)
        y = one(sample)
        dy = torch.arange(y.numel()).reshape(y.shape).sin().to(y.dtype)
        results.append((y, *torch.autograd.grad(y, (sample, ref), dy)))
    for mine, right in zip(*results, strict=True):
        assert ((mine - right).abs().max() / right.abs().max()).item() < 1e-6


def test_centered_rows_are_those_of_the_valid_entries() -> None:
    x, w = torch.randn(3, 2, 4, dtype=F64, requires_grad=True), torch.tensor([[[0, 2, 1, 0.5]]], dtype=F64)
    for dims in ((2,), (0, 2)):
        n = w.expand(3, 1, 4).sum(dims, keepdim=True)
        assert gradcheck(lambda x, dims=dims, n=n: centered(x, w.expand(3, 1, 4), n, dims), (x,))
        deviation, mean = centered(x, w.expand(3, 1, 4), n, dims)
        torch.testing.assert_close(mean, (x * w).sum(dims, keepdim=True) / n)
        torch.testing.assert_close(deviation, (x - mean) * (w > 0))


@pytest.mark.parametrize("kind", [torch.bool, F64], ids=str)
def test_mask_equals_the_valid_positions(kind: torch.dtype) -> None:
    layer, twin = made(activation="silu"), made(activation="silu")
    twin.load_state_dict(layer.state_dict())
    lengths, others = [4, 0, 1, 6], [5, 6, 0]
    mask, other = (torch.arange(6) < torch.tensor(each)[:, None] for each in (lengths, others))
    hole = ~mask.unsqueeze(1).expand(4, 3, 6)
    x, r, dy = (torch.randn(4, 3, 6, dtype=F64).masked_fill(hole, NAN) for _ in range(3))
    reference = torch.randn(3, 3, 6, dtype=F64).masked_fill(~other.unsqueeze(1), NAN)
    a = leaf(x)
    with reference_batch(layer):
        layer(reference, mask=other.to(kind))
    assert layer.num_batches_tracked == 2
    y = layer(a, r, mask.to(kind))
    (dx,) = torch.autograd.grad(y, a, dy)
    assert (y[hole] == 0).all()
    assert (dx[hole] == 0).all()
    # The valid positions of the reference as one long sample would count as one: so the number is set by hand.
    shown(twin, torch.cat([each[:, :n] for each, n in zip(reference, others, strict=True)], 1)[None])
    twin.num_batches_tracked.fill_(2)
    for i, length in enumerate(lengths):
        if length:
            b = leaf(x[i : i + 1, :, :length])
            alone = twin(b, r[i : i + 1, :, :length])
            torch.testing.assert_close(y[i : i + 1, :, :length], alone)
            (right,) = torch.autograd.grad(alone, b, dy[i : i + 1, :, :length])
            torch.testing.assert_close(dx[i : i + 1, :, :length], right)


def test_weights_are_frequencies_of_positions() -> None:
    layer = shown(made(), torch.randn(5, 3, 4, dtype=F64))
    weights = torch.tensor([0, 3, 1, 2])
    index = torch.repeat_interleave(torch.arange(4), weights)
    x = torch.randn(2, 3, 4, dtype=F64)
    torch.testing.assert_close(layer(x, mask=weights)[..., index], layer(x[..., index]))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_memory_layouts(layout: str) -> None:
    layer = shown(made(), torch.randn(5, 3, 4, 4, dtype=F64))
    x, r = torch.randn(2, 4, 3, 4, 5, dtype=F64)
    a = lay_out(x, layout)
    y = layer(a, r)
    assert y.stride() == torch.empty_like(a).stride()
    torch.testing.assert_close(y, layer(x, r))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_input_and_autocast(dtype: torch.dtype) -> None:
    layer = made(dtype=torch.float32)
    reference, x, dy = (torch.randn(6, 3, 5).to(dtype) for _ in range(3))
    outcomes = []
    for cast in (dtype, torch.float32):
        a, b = leaf(reference.to(cast)), leaf(x.to(cast))
        with reference_batch(layer):
            layer(a)
        y = layer(b)
        assert y.dtype == cast
        outcomes.append([each.to(dtype) for each in (y, *torch.autograd.grad(y, (a, b), dy.to(cast)))])
    for mine, right in zip(*outcomes, strict=True):
        assert same_bits(mine, right)
    with torch.autocast("cpu", dtype=dtype):
        again = layer(x.float())
    assert again.dtype == torch.float32
    assert same_bits(again, layer(x.float()))


def test_other_positions_than_the_references_and_no_samples() -> None:
    layer = shown(made(), torch.randn(5, 3, 4, 4, dtype=F64))
    assert layer(torch.randn(2, 3, 7, 1, dtype=F64)).shape == (2, 3, 7, 1)
    assert layer(torch.empty(0, 3, 4, 4, dtype=F64)).shape == (0, 3, 4, 4)
    with pytest.raises(InputError, match="an empty batch"), reference_batch(layer):
        layer(torch.empty(0, 3, 4, 4, dtype=F64))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.randn(4, 5),), InputError, "5"),
        ((torch.randn(3),), InputError, "batch axis"),
        ((torch.ones(9, 3, dtype=torch.int64),), InputTypeError, "floating-point"),
        ((torch.randn(9, 3), torch.randn(9, 5)), InputError, "residual"),
        ((torch.randn(9, 3), None, -torch.ones(9)), InputError, "weight -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    layer = shown(made(affine=False), torch.randn(5, 3, dtype=F64))
    with pytest.raises(error, match=text):
        layer(*arguments)
    with pytest.raises(error, match=text), reference_batch(layer):
        layer(*arguments)


def test_a_reference_of_one_value_is_refused() -> None:
    layer = made()
    with pytest.raises(InputError, match="more than 1 value"), reference_batch(layer):
        layer(torch.randn(1, 3, dtype=F64))
    with pytest.raises(InputError, match="softmax"):
        batchnorm.VirtualBatchNorm(3, activation="softmax")
    with pytest.raises(TypeError, match="momentum"):
        batchnorm.VirtualBatchNorm(3, momentum=0.1)
