"""GhostBatchNorm against a loop over the parts of the batch, in PyTorch's own batch norm."""

import pytest
import torch
from family_helpers import TIGHT, activate
from helpers import ACTIVATIONS, SLOPE
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm
from batchnorm import GhostBatchNorm, InputError, InputTypeError


def by_hand(layer: GhostBatchNorm, x: Tensor, sizes: list[int], residual: Tensor | None) -> Tensor:
    parts = [
        F.batch_norm(part, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)
        for part in x.split(sizes)
    ]
    z = torch.cat(parts)
    return activate(z if residual is None else z + residual, layer.activation)


def made(channels: int = 3, **options: object) -> GhostBatchNorm:
    layer = GhostBatchNorm(channels, negative_slope=SLOPE, dtype=torch.float64, **options)
    with torch.no_grad():
        layer.weight.uniform_(-2, 2)
        layer.bias.uniform_(-1, 1)
    return layer


CUTS = [
    ({"ghost_size": 4}, 12, [4, 4, 4]),
    ({"ghost_size": 4}, 14, [4, 4, 4, 2]),
    ({"ghost_size": 4}, 3, [3]),
    ({"ghost_size": 4}, 4, [4]),
    ({"splits": 3}, 12, [4, 4, 4]),
    ({"splits": 3}, 13, [5, 5, 3]),
    ({"splits": 5}, 6, [2, 2, 2]),
    ({"splits": 1}, 6, [6]),
    ({}, 70, [32, 32, 6]),
]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("cut", "samples", "sizes"), CUTS)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 2)])
def test_every_ghost_has_statistics_of_its_own(
    cut: dict[str, int], samples: int, sizes: list[int], shape: tuple[int, ...], backend: str | None
) -> None:
    if "ghost_size" in cut:
        assert sizes == [len(part) for part in torch.arange(samples).split(cut["ghost_size"])]
    elif "splits" in cut:
        assert sizes == [len(part) for part in torch.arange(samples).chunk(cut["splits"])]
    layer = made(backend=backend, **cut)
    # A trend over the batch: a ghost in the wrong place has another mean.
    trend = torch.arange(samples, dtype=torch.float64).reshape(-1, 1, *[1] * len(shape))
    x = torch.randn(samples, 3, *shape, dtype=torch.float64) + trend
    dy = torch.randn_like(x)
    given, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = layer(given)
    y.backward(dy)
    found = layer.weight.grad.clone(), layer.bias.grad.clone()
    layer.zero_grad()
    wanted = by_hand(layer, expected, sizes, None)
    wanted.backward(dy)
    torch.testing.assert_close(y, wanted, **TIGHT)
    torch.testing.assert_close(given.grad, expected.grad, **TIGHT)
    torch.testing.assert_close(found[0], layer.weight.grad, **TIGHT)
    torch.testing.assert_close(found[1], layer.bias.grad, **TIGHT)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("samples", [12, 14])
def test_activation_and_residual(activation: str | None, samples: int) -> None:
    layer = made(ghost_size=4, activation=activation)
    x, r, dy = torch.randn(3, samples, 3, 7, dtype=torch.float64)
    mine = [x.clone().requires_grad_(), r.clone().requires_grad_()]
    hand = [x.clone().requires_grad_(), r.clone().requires_grad_()]
    y = layer(*mine)
    y.backward(dy)
    sizes = [len(part) for part in x.split(4)]
    wanted = by_hand(layer, hand[0], sizes, hand[1])
    wanted.backward(dy)
    torch.testing.assert_close(y, wanted, **TIGHT)
    for a, b in zip(mine, hand, strict=True):
        torch.testing.assert_close(a.grad, b.grad, **TIGHT)


@pytest.mark.parametrize("samples", [12, 14])
def test_a_mask_counts_in_its_own_ghost(samples: int) -> None:
    layer = made(ghost_size=4)
    x, dy = torch.randn(2, samples, 3, 7, dtype=torch.float64)
    mask = torch.randint(0, 3, (samples, 7)).double()
    x[(mask == 0).unsqueeze(1).expand_as(x)] = float("nan")
    given = x.clone().requires_grad_()
    y = layer(given, mask=mask)
    y.backward(dy)
    plain = batchnorm.BatchNorm1d(3, dtype=torch.float64)
    plain.load_state_dict(made(ghost_size=4).state_dict())
    plain.weight, plain.bias = layer.weight, layer.bias
    at = 0
    for part in x.split(4):
        rows = slice(at, at + len(part))
        own = part.clone().requires_grad_()
        expected = plain(own, mask=mask[rows])
        expected.backward(dy[rows])
        torch.testing.assert_close(y[rows], expected, **TIGHT)
        torch.testing.assert_close(given.grad[rows], own.grad, **TIGHT)
        at += len(part)


@pytest.mark.parametrize("samples", [12, 14])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_are_those_of_plain_batch_norm(samples: int, momentum: float | None) -> None:
    layer = made(ghost_size=4, momentum=momentum)
    plain = nn.BatchNorm1d(3, momentum=momentum, dtype=torch.float64)
    for step in range(3):
        x = torch.randn(samples, 3, 7, dtype=torch.float64) * 2 + 1e4 + step
        x += torch.arange(samples).reshape(-1, 1, 1) * 10  # between the ghosts, too
        layer(x)
        plain(x)
    torch.testing.assert_close(layer.running_mean, plain.running_mean, **TIGHT)
    torch.testing.assert_close(layer.running_var, plain.running_var, **TIGHT)
    assert layer.num_batches_tracked == 3


def test_a_mask_weighs_the_ghosts_in_the_running_statistics() -> None:
    layer = made(ghost_size=4, momentum=1.0)
    plain = batchnorm.BatchNorm1d(3, momentum=1.0, dtype=torch.float64)
    x = torch.randn(12, 3, 7, dtype=torch.float64) + torch.arange(12).reshape(-1, 1, 1)
    mask = torch.randint(0, 3, (12, 7)).double()
    mask[4:8] = 0
    layer(x, mask=mask)
    plain(x, mask=mask)
    torch.testing.assert_close(layer.running_mean, plain.running_mean, **TIGHT)
    torch.testing.assert_close(layer.running_var, plain.running_var, **TIGHT)


@pytest.mark.parametrize(("size", "samples", "sizes"), [(4, 9, [4, 5]), (4, 5, [5]), (2, 3, [3])])
def test_a_rest_of_one_value_joins_the_ghost_before_it(size: int, samples: int, sizes: list[int]) -> None:
    layer = made(ghost_size=size)
    x = torch.randn(samples, 3, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_hand(layer, x, sizes, None), **TIGHT)


@pytest.mark.parametrize(
    ("cut", "samples"), [({"ghost_size": 1}, 8), ({"splits": 8}, 8), ({"splits": 8}, 5), ({"splits": 2}, 1)]
)
def test_ghosts_of_one_value_follow_the_rule_for_single_values(cut: dict[str, int], samples: int) -> None:
    x = torch.randn(samples, 3, dtype=torch.float64)
    with pytest.raises(InputError, match="more than 1 value per channel"):
        made(**cut)(x)
    running = made(single="running", **cut)
    running.running_mean.uniform_(-1, 1)
    mean = running.running_mean.clone()
    torch.testing.assert_close(running(x), running.eval()(x), **TIGHT)
    assert torch.equal(running.running_mean, mean)
    zero = made(single="zero", **cut)
    torch.testing.assert_close(zero(x), zero.bias.expand_as(x), **TIGHT)
    wide = torch.randn(samples, 3, 2, dtype=torch.float64)  # two positions: two values
    assert made(**cut)(wide).isfinite().all()


def test_eval_is_plain_batch_norm() -> None:
    layer = made(ghost_size=4)
    layer(torch.randn(14, 3, 5, dtype=torch.float64) * 3 + 1)
    layer.eval()
    x = torch.randn(14, 3, 5, dtype=torch.float64)
    expected = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, False)
    torch.testing.assert_close(layer(x), expected, **TIGHT)


@pytest.mark.parametrize("samples", [6, 7])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients(samples: int, activation: str | None) -> None:
    layer = made(2, ghost_size=3, activation=activation, track_running_stats=False)
    x = torch.randn(samples, 2, 3, dtype=torch.float64, requires_grad=True)
    parameters = (layer.weight, layer.bias)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters))
    assert torch.autograd.gradgradcheck(call, (x, *parameters))


def test_bad_options() -> None:
    with pytest.raises(InputError, match="ghost_size=4 and splits=2"):
        GhostBatchNorm(3, ghost_size=4, splits=2)
    with pytest.raises(InputError, match="at least 1"):
        GhostBatchNorm(3, ghost_size=0)
    with pytest.raises(InputTypeError, match="splits"):
        GhostBatchNorm(3, splits=2.5)  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match="ghost_size"):
        GhostBatchNorm(3, ghost_size=True)
    assert "ghost_size=32" in repr(GhostBatchNorm(3))
    assert "splits=4" in repr(GhostBatchNorm(3, splits=4))


def test_compiled_for_several_batch_sizes() -> None:
    torch.compiler.reset()
    for cut in ({"ghost_size": 4}, {"splits": 3}):
        layer = made(track_running_stats=False, **cut)
        call = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for samples in (13, 11, 10, 20):
            x = torch.randn(samples, 3, 2, dtype=torch.float64)
            torch.testing.assert_close(call(x), layer(x), **TIGHT)
