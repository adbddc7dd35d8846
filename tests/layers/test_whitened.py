"""WhitenedBatchNorm against a slow and obvious implementation, group by group, and its gradients by differences."""

import copy
import itertools

import pytest
import torch
from helpers import ACTIVATIONS, lay_out, leaf, same_bits
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from whitened_helpers import F64, METHODS, activate, correlated, expected, made, root

from batchnorm import InputError, WhitenedBatchNorm

NAN = float("nan")
SHAPES = [(9, 6), (4, 6, 5), (3, 6, 4, 3), (2, 6, 2, 3, 3)]
both = pytest.mark.parametrize("method", METHODS)


@both
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_papers_formulas(
    shape: tuple[int, ...], activation: str | None, with_residual: bool, method: str
) -> None:
    layer = made(activation=activation, method=method)
    x, r, dy = correlated(*shape), torch.randn(shape, dtype=F64), torch.randn(shape, dtype=F64)
    results = []
    for ours in (True, False):
        a, b = leaf(x), leaf(r)
        weight, bias = leaf(layer.weight), leaf(layer.bias)
        if ours:
            y = functional_call(layer, {"weight": weight, "bias": bias}, (a, b if with_residual else None))
        else:
            z, mean, covariance = expected(a, layer, weight, bias)
            y = activate(z + b if with_residual else z, activation)
        wanted = [a, weight, bias, *([b] if with_residual else [])]
        results.append((y, *torch.autograd.grad(y, wanted, dy)))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
    n = x.numel() / shape[1]
    torch.testing.assert_close(layer.running_mean, 0.1 * mean)
    start = torch.eye(3, dtype=F64).expand(2, 3, 3)
    torch.testing.assert_close(layer.running_cov, 0.9 * start + 0.1 * covariance * n / (n - 1))
    assert layer.num_batches_tracked == 1


@both
def test_output_is_white(method: str) -> None:
    layer = WhitenedBatchNorm(
        8, eps=1e-10, affine=False, method=method, group_size=4, iterations=40, dtype=F64
    )
    y = layer(correlated(50, 8, 7)).movedim(1, 0).flatten(1)
    inside = torch.block_diag(*[torch.ones(4, 4, dtype=F64)] * 2)
    torch.testing.assert_close(y.cov(correction=0) * inside, torch.eye(8, dtype=F64), rtol=0, atol=1e-6)


def test_newton_comes_closer_to_zca_with_every_iteration() -> None:
    x = correlated(200, 4)
    exact = WhitenedBatchNorm(4, dtype=F64)(x)
    distances = [
        (WhitenedBatchNorm(4, method="newton", iterations=T, dtype=F64)(x) - exact).norm().item()
        for T in (1, 3, 5, 9, 30)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.1
    assert distances[-1] < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_groups_of_one_are_batch_norm(method: str) -> None:
    plain = nn.BatchNorm2d(4, dtype=F64)
    layer = WhitenedBatchNorm(4, group_size=1, method=method, iterations=1, dtype=F64)
    for _ in range(3):
        x = torch.randn(5, 4, 3, 2, dtype=F64) * 3 + 1
        torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer.running_cov.flatten(), plain.running_var)
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))


def test_gradient_at_exactly_equal_eigenvalues() -> None:
    # Σ = I / 2 without rounding: four values, ± along each axis.
    x = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=F64, requires_grad=True)
    layer = WhitenedBatchNorm(2, affine=False, track_running_stats=False, dtype=F64)
    dy = torch.randn(4, 2, dtype=F64)
    (dx,) = torch.autograd.grad(layer(x), x, dy)
    assert dx.isfinite().all()
    step = 1e-6
    for i, j in itertools.product(range(4), range(2)):
        nudge = torch.zeros_like(x)
        nudge[i, j] = step
        slope = ((layer(x + nudge) - layer(x - nudge)) * dy).sum() / (2 * step)
        assert abs(slope - dx[i, j]) < 1e-8
    assert gradcheck(layer, (x,))
    assert gradgradcheck(layer, (x,))
    # The same through the eigenvectors' own gradient.
    covariance = (x.T @ x / 4).detach().requires_grad_()
    naive = torch.autograd.grad(root(covariance, 1e-5, "zca", 0), covariance, dy.T @ dy)[0]
    assert not naive.isfinite().all()


@both
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_derivatives_by_differences(masked: bool, method: str) -> None:
    layer = made(4, group_size=2, method=method, track_running_stats=False, activation="silu")
    x, r = (torch.randn(4, 4, 3, dtype=F64, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[1, 0.5, 0], [2, 1, 1], [0, 0, 0], [1, 3, 1]]) if masked else None

    def call(x: Tensor, r: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional_call(layer, {"weight": weight, "bias": bias}, (x, r, mask))

    arguments = (x, r, leaf(layer.weight), leaf(layer.bias))
    assert gradcheck(call, arguments)
    assert gradgradcheck(call, arguments)


@both
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_mask_equals_the_compressed_entries_with_nan_under_zero(training: bool, method: str) -> None:
    valid = torch.rand(6, 7) < 0.6
    valid[2] = False
    hole = ~valid.unsqueeze(1).expand(6, 6, 7)
    x, r, dy = (correlated(6, 6, 7).masked_fill(hole, NAN) for _ in range(3))
    results = []
    layer = made(method=method, activation="silu")
    for compress in (False, True):
        twin = copy.deepcopy(layer).train(training)
        a, b, g = (leaf(t.movedim(1, -1)[valid] if compress else t) for t in (x, r, dy))
        y = twin(a, b, None if compress else valid)
        gradients = torch.autograd.grad(y, (a, b, twin.weight, twin.bias), g.detach())
        results.append((y, *gradients, *twin.buffers()))
    for mine, other in zip(*results, strict=True):
        if mine.dim() == 3 and mine.shape[0] == 6:
            assert (mine[hole] == 0).all()
            mine = mine.movedim(1, -1)[valid]
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@both
def test_weights_are_frequencies(method: str) -> None:
    weights = torch.tensor([0, 3, 1, 2, 0, 1, 4, 1])
    x, layer = correlated(8, 6), made(method=method)
    twin = copy.deepcopy(layer)
    index = torch.repeat_interleave(torch.arange(8), weights)
    y = layer(x, mask=weights)
    torch.testing.assert_close(y[index], twin(x[index]))
    for mine, other in zip(layer.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, other)


@both
def test_momentum_none_averages_the_unbiased_covariances_and_eval_uses_them(method: str) -> None:
    layer = made(momentum=None, method=method)
    batches = [correlated(8 + i, 6) for i in range(4)]
    for batch in batches:
        layer(batch)
    mean = sum(batch.mean(0) for batch in batches) / 4
    whole = sum(batch.T.cov() for batch in batches) / 4
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_cov, torch.stack([whole[:3, :3], whole[3:, 3:]]))
    W = torch.block_diag(*(root(each, layer.eps, method, 5) for each in layer.running_cov))
    x, dy = leaf(batches[0]), torch.randn(8, 6, dtype=F64)
    before = [each.clone() for each in layer.buffers()]
    y = layer.eval()(x)
    torch.testing.assert_close(y, (x - mean) @ W * layer.weight + layer.bias)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], (dy * layer.weight) @ W)
    assert all(same_bits(a, b) for a, b in zip(before, layer.buffers(), strict=True))
    # Training moves the buffers between an eval call and its backward.
    y = layer(x)
    layer.train()(batches[1])
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], (dy * layer.weight) @ W)


def test_without_tracking_eval_uses_the_batch() -> None:
    layer = made(track_running_stats=False)
    x = correlated(9, 6)
    assert same_bits(layer(x), layer.eval()(x))
    assert list(layer.buffers()) == []
    toggled = made()
    toggled.track_running_stats = False
    toggled(x)
    assert toggled.num_batches_tracked == 0


def test_empty_batch() -> None:
    layer = made()
    start = [each.clone() for each in (layer.running_mean, layer.running_cov)]
    for training in (True, False):
        assert layer.train(training)(torch.empty(0, 6, 2, dtype=F64)).shape == (0, 6, 2)
    assert same_bits(layer.running_mean, start[0])
    assert same_bits(layer.running_cov, start[1])
    assert layer.num_batches_tracked == 1  # as in PyTorch


def test_one_value_per_channel() -> None:
    x = torch.randn(1, 6, dtype=F64)
    with pytest.raises(InputError, match="more than 1 value per channel"):
        made()(x)
    running = made(single="running")
    running(correlated(20, 6))
    buffers = [each.clone() for each in running.buffers()]
    assert same_bits(running(x), copy.deepcopy(running).eval()(x))
    assert all(same_bits(a, b) for a, b in zip(buffers, running.buffers(), strict=True))
    zero = made(single="zero")
    assert same_bits(zero(x), zero.bias.expand(1, 6))
    assert same_bits(zero.running_cov, torch.eye(3, dtype=F64).expand(2, 3, 3).contiguous())
    torch.testing.assert_close(zero.running_mean, 0.1 * x[0])


def test_warns_where_nothing_but_a_rotation_is_left() -> None:
    layer = made()
    with pytest.warns(UserWarning, match="4 values per channel for groups of 3"):
        layer(torch.randn(4, 6, dtype=F64))
    layer(torch.randn(5, 6, dtype=F64))
    layer.eval()(torch.randn(4, 6, dtype=F64))
    made(group_size=1)(torch.randn(2, 6, dtype=F64))
    # What the warning says: the distances between the samples are those of every batch.
    bare = WhitenedBatchNorm(3, eps=1e-12, affine=False, dtype=F64)
    with pytest.warns(UserWarning, match="4 values"):
        grams = [(y := bare(torch.randn(4, 3, dtype=F64))) @ y.T for _ in range(2)]
    torch.testing.assert_close(*grams)


@both
def test_nan_poisons_its_group_alone(method: str) -> None:
    clean, dy = correlated(9, 6), torch.randn(9, 6, dtype=F64)
    dirty = clean.clone()
    dirty[2, 1] = NAN
    results = []
    for x in (clean, dirty):
        layer = made(method=method, nonfinite="skip")
        twin, a = made(method=method), leaf(x)
        layer.load_state_dict(twin.state_dict())
        torch.manual_seed(5)
        with torch.no_grad():
            layer.weight.uniform_(), layer.bias.uniform_()
        y = layer(a)
        results.append((y, torch.autograd.grad(y, a, dy)[0], layer.running_mean, layer.running_cov))
    for right, wrong in zip(*results, strict=True):
        if wrong.dim() == 2:
            assert same_bits(right[:, 3:].contiguous(), wrong[:, 3:].contiguous())
            assert wrong[:, :3].isnan().all()
    assert same_bits(results[0][2][3:], results[1][2][3:])
    assert same_bits(results[0][3][1], results[1][3][1])
    assert results[1][2][:3].tolist() == [0, 0, 0]
    assert torch.equal(results[1][3][0], torch.eye(3, dtype=F64))
    propagating = made(method=method)
    propagating(dirty)
    assert propagating.running_cov[0].isnan().any()
    assert propagating.running_cov[1].isfinite().all()
    assert propagating.eval()(clean)[:, :3].isnan().all()  # LAPACK refuses NaN
    overflown = made(method=method)
    overflown.running_cov[0].fill_(torch.inf)
    assert overflown.eval()(clean)[:, :3].isnan().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_memory_layouts(layout: str) -> None:
    layer = made()
    twin = copy.deepcopy(layer)
    x, r = correlated(4, 6, 3, 5), torch.randn(4, 6, 3, 5, dtype=F64)
    a = lay_out(x, layout)
    y = layer(a, r)
    assert y.stride() == torch.empty_like(a).stride()
    torch.testing.assert_close(y, twin(x, r))


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_input_and_autocast(dtype: torch.dtype, method: str) -> None:
    layer = made(method=method, dtype=torch.float32)
    x, dy = correlated(40, 6, 5, dtype=torch.float32).to(dtype), torch.randn(40, 6, 5).to(dtype)
    a, b = leaf(x), leaf(x.float())
    y, exact = layer(a), layer(b)
    assert y.dtype == dtype
    assert same_bits(y, exact.to(dtype))
    (dx,) = torch.autograd.grad(y, a, dy)
    (right,) = torch.autograd.grad(exact, b, dy.float())
    assert same_bits(dx, right.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        again = layer(x.float())
    assert again.dtype == torch.float32
    assert same_bits(again, exact)


@both
def test_float32_of_nearly_dependent_channels_with_an_offset(method: str) -> None:
    """The small eigenvalue is 10⁻⁵ of the large one, and the mean 100 times the deviation."""
    scale = torch.tensor([1, 10**-2.5] * 8)
    basis = torch.linalg.qr(torch.randn(16, 16))[0]
    x = (torch.randn(5000, 16) * scale) @ basis + 100
    layer = WhitenedBatchNorm(16, method=method)
    exact = WhitenedBatchNorm(16, method=method, dtype=F64)
    wide, a = leaf(x.double()), leaf(x)
    y, right = layer(a), exact(wide)
    assert ((y - right).abs().max() / right.abs().max()).item() < 1e-4
    dy = torch.randn_like(y)
    (dx,), (right,) = torch.autograd.grad(y, a, dy), torch.autograd.grad(right, wide, dy.double())
    assert ((dx - right).abs().max() / right.abs().max()).item() < 1e-4
