"""BatchRenorm against its formula written down in PyTorch's operators, with r and d detached."""

import pytest
import torch
from family_helpers import TIGHT, activate
from helpers import ACTIVATIONS, SLOPE
from torch import Tensor

import batchnorm
from batchnorm import BatchRenorm, InputError, InputTypeError


def by_hand(
    layer: BatchRenorm, x: Tensor, r_max: float, d_max: float, residual: Tensor | None = None
) -> Tensor:
    axes = [axis for axis in range(x.dim()) if axis != 1]
    shape = (1, -1, *[1] * (x.dim() - 2))
    mean = x.mean(axes)
    sigma = (x.var(axes, unbiased=False) + layer.eps).sqrt()
    running = (layer.running_var.double() + layer.eps).sqrt()
    r = (sigma / running).clamp(1 / r_max, r_max).detach()
    d = ((mean - layer.running_mean) / running).clamp(-d_max, d_max).detach()
    xhat = (x - mean.reshape(shape)) / sigma.reshape(shape) * r.reshape(shape) + d.reshape(shape)
    z = xhat * layer.weight.reshape(shape) + layer.bias.reshape(shape)
    return activate(z if residual is None else z + residual, layer.activation)


def made(**options: object) -> BatchRenorm:
    layer = BatchRenorm(3, negative_slope=SLOPE, dtype=torch.float64, **options)
    with torch.no_grad():
        layer.weight.uniform_(-2, 2)
        layer.bias.uniform_(-1, 1)
        layer.running_mean.copy_(torch.tensor([0.5, -0.2, 9.0]))
        layer.running_var.copy_(torch.tensor([0.7, 30.0, 1.2]))
    return layer


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("bounds", [(1.0, 0.0), (2.0, 1.0), (100.0, 100.0)])
def test_output_and_gradients(
    shape: tuple[int, ...], bounds: tuple[float, float], backend: str | None
) -> None:
    layer = made(r_max=bounds[0], d_max=bounds[1], backend=backend)
    x = torch.randn(12, 3, *shape, dtype=torch.float64)
    dy = torch.randn_like(x)
    given, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    wanted = by_hand(layer, expected, *bounds)
    wanted.backward(dy)
    found = layer.weight.grad.clone(), layer.bias.grad.clone()
    layer.zero_grad()
    y = layer(given)
    y.backward(dy)
    torch.testing.assert_close(y, wanted, **TIGHT)
    torch.testing.assert_close(given.grad, expected.grad, **TIGHT)
    torch.testing.assert_close(layer.weight.grad, found[0], **TIGHT)
    torch.testing.assert_close(layer.bias.grad, found[1], **TIGHT)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_residual(activation: str | None) -> None:
    layer = made(r_max=2, d_max=1, activation=activation)
    x, r, dy = torch.randn(3, 8, 3, 7, dtype=torch.float64)
    mine = [x.clone().requires_grad_(), r.clone().requires_grad_()]
    hand = [x.clone().requires_grad_(), r.clone().requires_grad_()]
    wanted = by_hand(layer, hand[0], 2.0, 1.0, hand[1])
    wanted.backward(dy)
    layer(*mine).backward(dy)
    for a, b in zip(mine, hand, strict=True):
        torch.testing.assert_close(a.grad, b.grad, **TIGHT)


def test_running_statistics_move_as_in_batch_norm_and_after_the_correction() -> None:
    layer = made(r_max=3, d_max=5, momentum=0.3)
    plain = batchnorm.BatchNorm1d(3, momentum=0.3, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    for _ in range(3):
        x = torch.randn(16, 3, dtype=torch.float64) * 2 + 1
        wanted = by_hand(layer, x, 3.0, 5.0)  # by the statistics before this batch
        torch.testing.assert_close(layer(x), wanted, **TIGHT)
        plain(x)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value, **TIGHT)


def test_where_nothing_is_clipped_training_gives_what_eval_gives() -> None:
    layer = made(r_max=1e9, d_max=1e9)
    x = torch.randn(16, 3, 4, dtype=torch.float64)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    y = layer(x)
    layer.load_state_dict(before)
    torch.testing.assert_close(y, layer.eval()(x), **TIGHT)


SCHEDULE = ((10, 1.0), (20, 3.0), (40, 3.0), (50, 2.0))


@pytest.mark.parametrize(
    ("step", "bound"), [(0, 1), (10, 1), (15, 2), (20, 3), (30, 3), (45, 2.5), (50, 2), (9999, 2)]
)
def test_the_schedule_counts_batches(step: int, bound: float) -> None:
    layer = made(r_max=SCHEDULE, d_max=((0, 0.0), (100, 1.0)))
    layer.num_batches_tracked.fill_(step)
    x = torch.randn(16, 3, dtype=torch.float64) * 50
    wanted = by_hand(layer, x, bound, min(step / 100, 1.0))
    torch.testing.assert_close(layer(x), wanted, **TIGHT)


def test_the_schedule_of_the_paper_is_the_default() -> None:
    layer = BatchRenorm(3)
    x = torch.randn(16, 3) * 9 + 4
    layer.num_batches_tracked.fill_(4_999)
    torch.testing.assert_close(layer(x), batchnorm.BatchNorm1d(3)(x))
    layer = BatchRenorm(3, dtype=torch.float64)
    layer.num_batches_tracked.fill_(40_000)
    x = x.double()
    torch.testing.assert_close(layer(x), by_hand(BatchRenorm(3, dtype=torch.float64), x, 3.0, 5.0), **TIGHT)


def test_the_warm_up_is_plain_batch_norm() -> None:
    layer, plain = made(r_max=3, d_max=5, warmup=2), batchnorm.BatchNorm1d(3, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(16, 3, dtype=torch.float64) * 9
    for _ in range(2):
        torch.testing.assert_close(layer(x), plain(x), **TIGHT)
    wanted = by_hand(layer, x, 3.0, 5.0)
    assert not torch.allclose(wanted, plain(x))
    torch.testing.assert_close(layer(x), wanted, **TIGHT)


def test_a_mask_and_a_bad_channel() -> None:
    layer = made(r_max=2, d_max=1)
    before = layer.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    x = torch.randn(8, 3, 7, dtype=torch.float64)
    mask = torch.arange(7) < 4
    y = layer(torch.where(mask, x, float("nan")), mask=mask)
    layer.load_state_dict(before)
    torch.testing.assert_close(y[:, :, :4], layer(x[:, :, :4].contiguous()), **TIGHT)
    assert not y[:, :, 4:].any()
    layer.load_state_dict(before)
    clean = layer(x)
    layer.load_state_dict(before)
    x[2, 1, 3] = float("nan")
    bad = layer(x)
    assert bad[:, 1].isnan().all()
    torch.testing.assert_close(bad[:, ::2], clean[:, ::2], rtol=0, atol=0)


def test_an_empty_batch_changes_nothing() -> None:
    layer = made(r_max=2, d_max=1)
    before = layer.running_mean.clone()
    assert layer(torch.empty(0, 3, 4, dtype=torch.float64)).shape == (0, 3, 4)
    assert torch.equal(layer.running_mean, before)


def test_gradients_with_r_and_d_held() -> None:
    # Finite differences would move r and d, through which no gradient flows: at the bounds they do not move.
    layer = made(r_max=1.0001, d_max=0.0001)
    x = torch.randn(6, 3, 2, dtype=torch.float64, requires_grad=True)
    state = {name: value.clone() for name, value in layer.state_dict().items()}

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        given = {**{name: value.clone() for name, value in state.items()}, "weight": weight, "bias": bias}
        return torch.func.functional_call(layer, given, (x,))

    assert torch.autograd.gradcheck(call, (x, layer.weight, layer.bias))
    assert torch.autograd.gradgradcheck(call, (x, layer.weight, layer.bias))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"r_max": 0.5}, InputError),
        ({"r_max": float("nan")}, InputError),
        ({"r_max": ()}, InputError),
        ({"r_max": "three"}, InputTypeError),
        ({"r_max": ((5, 1.0), (5, 2.0))}, InputError),
        ({"r_max": ((-1, 1.0),)}, InputError),
        ({"d_max": -1}, InputError),
        ({"d_max": None}, InputTypeError),
        ({"warmup": -1}, InputError),
        ({"warmup": 1.5}, InputTypeError),
        ({"track_running_stats": False}, InputError),
    ],
)
def test_bad_options(options: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        BatchRenorm(3, **options)  # type: ignore[arg-type]


def test_the_text_names_the_bounds() -> None:
    assert "r_max=3, d_max=5, warmup=100" in repr(BatchRenorm(3, r_max=3, d_max=5, warmup=100))
    assert "r_max=1 at batch 5000 to 3 at batch 40000" in repr(BatchRenorm(3))


def test_bounds_may_be_set_during_training() -> None:
    layer = made(r_max=3, d_max=5)
    assert (layer.r_max, layer.d_max) == (3, 5)
    layer.r_max, layer.d_max = 1.5, [(0, 0.5)]
    x = torch.randn(16, 3, dtype=torch.float64) * 9
    wanted = by_hand(layer, x, 1.5, 0.5)
    torch.testing.assert_close(layer(x), wanted, **TIGHT)
    assert "r_max=1.5, d_max=0.5" in repr(layer)
    layer.r_max = 0.5
    with pytest.raises(InputError, match="r_max"):
        layer(x)


def test_without_running_statistics_it_is_refused_and_not_converted_to() -> None:
    layer = made(r_max=3, d_max=5)
    layer.track_running_stats = False
    with pytest.raises(InputError, match="track_running_stats=False"):
        layer(torch.randn(16, 3, dtype=torch.float64))
    plain = torch.nn.BatchNorm1d(3, track_running_stats=False)
    changes = batchnorm.convert(torch.nn.Sequential(plain), "renorm")
    assert not changes.changed
    assert "to correct towards" in changes.skipped[0].reason
