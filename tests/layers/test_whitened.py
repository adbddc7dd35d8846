"""WhitenedBatchNorm against a slow and obvious implementation, group by group, and its gradients by differences."""

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from helpers import ACTIVATIONS, SLOPE, lay_out, leaf, same_bits
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import batchnorm
from batchnorm import InputError, InputTypeError, WhitenedBatchNorm

NAN = float("nan")
F64 = torch.float64
METHODS = ["zca", "newton"]
SHAPES = [(9, 6), (4, 6, 5), (3, 6, 4, 3), (2, 6, 2, 3, 3)]
both = pytest.mark.parametrize("method", METHODS)


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
    layer = made(method=method, activation="relu")
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
    propagating.eval()(clean)  # LAPACK refuses NaN


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_memory_layouts(layout: str) -> None:
    layer = made()
    x, r = correlated(4, 6, 3, 5), torch.randn(4, 6, 3, 5, dtype=F64)
    a = lay_out(x, layout)
    y = layer(a, r)
    assert y.stride() == torch.empty_like(a).stride()
    torch.testing.assert_close(y, made_like(layer)(x, r))


def made_like(layer: WhitenedBatchNorm) -> WhitenedBatchNorm:
    return pickle.loads(pickle.dumps(layer))


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


def test_function_transforms() -> None:
    layer = made(track_running_stats=False)
    x = correlated(3, 9, 6)
    torch.testing.assert_close(vmap(layer)(x), torch.stack([layer(each) for each in x]))
    dy = torch.randn(9, 6, dtype=F64)
    slopes = vmap(grad(lambda each: (layer(each) * dy).sum()))(x)
    a = leaf(x)
    (expected_slopes,) = torch.autograd.grad(sum((layer(each) * dy).sum() for each in a), a)
    torch.testing.assert_close(slopes, expected_slopes)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does it itself
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method:DeprecationWarning")  # inductor's own
@both
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole(backend: str, method: str) -> None:
    torch.compiler.reset()
    eager = made(method=method, activation="relu")
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, fullgraph=True, backend=backend)
    x, r, dy = correlated(8, 6, 4), torch.randn(8, 6, 4, dtype=F64), torch.randn(8, 6, 4, dtype=F64)
    mask = torch.rand(8, 4) < 0.8
    for training in (True, False):
        outcomes = []
        for layer, call in ((eager, eager), (traced, compiled)):
            layer.train(training)
            a = leaf(x)
            y = call(a, r, mask)
            outcomes.append((y, *torch.autograd.grad(y, (a, layer.weight), dy), *layer.buffers()))
        for mine, other in zip(*outcomes, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)
    torch.compiler.reset()


@pytest.mark.parametrize("shape", [(5, 4, 3, 2), (9, 4)], ids=str)
def test_a_plain_checkpoint_is_the_diagonal(shape: tuple[int, ...]) -> None:
    source = nn.Sequential((nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(4))
    x = torch.randn(shape) * 2 + 1
    source(x)
    target = nn.Sequential(WhitenedBatchNorm(4, group_size=2))
    target.load_state_dict(source.state_dict(), strict=True)
    assert target[0].num_batches_tracked == 1
    torch.testing.assert_close(target.eval()(x), source.eval()(x))
    assert list(source.state_dict()) != list(target.state_dict())
    with pytest.raises(RuntimeError, match="running_cov"):
        source.load_state_dict(target.state_dict())
    with pytest.raises(RuntimeError, match="running_cov"):
        nn.Sequential(WhitenedBatchNorm(4, group_size=4)).load_state_dict(target.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        WhitenedBatchNorm(3).load_state_dict(nn.BatchNorm2d(4).state_dict())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies_are_equal_and_apart(way: str) -> None:
    layer = made(method="newton", iterations=7, activation="silu", momentum=None)
    x = correlated(9, 6)
    layer(x)
    if way == "deepcopy":
        twin = copy.deepcopy(layer)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    elif way == "torch.save":
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    else:
        twin = made(method="newton", iterations=7, activation="silu", momentum=None)
        twin.load_state_dict(layer.state_dict(), strict=True)
    assert repr(twin) == repr(layer)
    twin(x)
    assert (layer.num_batches_tracked.item(), twin.num_batches_tracked.item()) == (1, 2)
    twin.reset_running_stats()
    assert torch.equal(twin.running_cov, torch.eye(3, dtype=F64).expand(2, 3, 3))
    assert same_bits(layer(x), twin(x))


def test_repr_names_what_is_set() -> None:
    text = repr(made(method="newton", activation="leaky_relu", bias=False, nonfinite="skip", single="zero"))
    for part in (
        "6, eps=0.001",
        "newton",
        "group_size=3",
        "iterations=5",
        "bias=False",
        "0.2",
        "skip",
        "zero",
    ):
        assert part in text
    assert "iterations" not in repr(WhitenedBatchNorm(4))


def test_group_size_by_default() -> None:
    assert [WhitenedBatchNorm(c).group_size for c in (1, 12, 16, 64)] == [1, 12, 16, 16]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"num_features": 0}, InputError, "at least 1"),
        ({"num_features": 2.0}, InputTypeError, "an integer"),
        ({"num_features": 24}, InputError, "Choose among 1, 2, 3, 4, 6, 8, 12, 24"),
        ({"group_size": 4}, InputError, "4 for 6 channels"),
        ({"group_size": 0}, InputError, "divisor"),
        ({"group_size": True}, InputTypeError, "group_size"),
        ({"eps": 0}, InputError, "above 0"),
        ({"eps": "1"}, InputTypeError, "a number"),
        ({"momentum": 1.5}, InputError, "from 0 to 1"),
        ({"method": "pca"}, InputError, "'zca', 'newton'"),
        ({"iterations": 0}, InputError, "at least 1"),
        ({"iterations": 2.5}, InputTypeError, "an integer"),
        ({"activation": "softmax"}, InputError, "softmax"),
        ({"single": "no"}, InputError, "'running'"),
        ({"nonfinite": "no"}, InputError, "'skip'"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        WhitenedBatchNorm(**{"num_features": 6} | options)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.randn(4, 5),), InputError, "6"),
        ((torch.randn(6),), InputError, "batch axis"),
        ((torch.ones(9, 6, dtype=torch.int64),), InputTypeError, "floating-point"),
        ((torch.randn(9, 6, dtype=torch.complex64),), InputTypeError, "real"),
        (([1.0],), InputTypeError, "a torch.Tensor"),
        ((torch.randn(9, 6), torch.randn(9, 5)), InputError, "residual"),
        ((torch.randn(9, 6), None, torch.ones(8)), InputError, "mask"),
        ((torch.randn(9, 6), None, -torch.ones(9)), InputError, "weight -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "bare"])
def test_bad_input(affine: bool, arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        WhitenedBatchNorm(6, affine=affine, track_running_stats=affine)(*arguments)


def test_tools_leave_it_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), WhitenedBatchNorm(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    x = torch.randn(9, 3, 4, 4)
    net(x)
    whitened = net[1]
    assert not isinstance(whitened, nn.modules.batchnorm._BatchNorm)
    before = {name: value.clone() for name, value in whitened.state_dict().items()}
    for operation in (batchnorm.fold, batchnorm.freeze, batchnorm.fuse, batchnorm.absorb_bias):
        changed = operation(net.eval()).model[1]
        assert type(changed) is WhitenedBatchNorm
        assert all(same_bits(value, before[name]) for name, value in changed.state_dict().items())
        assert changed.weight.requires_grad
    y = net(x)
    torch.testing.assert_close(batchnorm.fold(net).model(x), y)
    assert [layer.name for layer in batchnorm.recalibrate(net, [x]).layers] == ["3"]
    assert all(same_bits(value, before[name]) for name, value in whitened.state_dict().items())
    spared = batchnorm.parameter_groups(net, 0.1)[1]["params"]
    assert any(each is whitened.weight for each in spared)
    assert [node.op for node in torch.fx.symbolic_trace(net).graph.nodes][1:5] == ["call_module"] * 4


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_scripting_says_that_it_cannot_be() -> None:
    with pytest.raises(batchnorm.ModelError, match="WhitenedBatchNorm"):
        torch.jit.script(WhitenedBatchNorm(4))
