"""The compositions: one call a direction, which counts the batch and moves the running statistics, and eval mode."""

from typing import Any

import pytest
import torch
from helpers import SLOPE, same_bits
from torch import Tensor
from triton_helpers import DEVICE, EPS, Data, marks, near

import batchnorm
from batchnorm import reference
from batchnorm.ops.aten import Running

pytestmark = marks  # with pytest.mark.gpu where there is a GPU
slow = () if DEVICE == "cuda" else pytest.mark.slow


@pytest.fixture(scope="module")
def launch() -> Any:
    from batchnorm.kernels.triton import launch

    return launch


def buffers(dtype: torch.dtype = torch.float32, counted: int = 6) -> list[Tensor]:
    values = torch.full((3,), 0.5, dtype=dtype), torch.ones(3, dtype=dtype), torch.tensor(counted)
    return [value.to(DEVICE) for value in values]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=slow)], ids=str)
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("shape", [(4, 3, 8), pytest.param((5, 3), marks=slow)], ids=str)
def test_one_call_moves_the_running_statistics(
    launch: Any, shape: tuple[int, ...], skip: bool, momentum: float | None, dtype: torch.dtype
) -> None:
    x = torch.randn(shape).to(DEVICE) + 1
    x[2, 1] = float("nan")
    mine, other = buffers(dtype), buffers(dtype)
    versions = [value._version for value in mine]
    launch.train_forward(x, None, None, None, Running(*mine, momentum, skip), EPS, None, SLOPE)
    _, mean, var, count, _ = launch.forward(x, None, None, None, None, 1, EPS, None, SLOPE)
    other[2] += 1
    reference.update_running_(*other, mean, var, count, momentum, skip)
    # The interpreter cuts bfloat16 off where a GPU rounds.
    cut = dtype == torch.bfloat16 and DEVICE == "cpu"

    def same(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a.double(), b.double(), 2.0**-7, 0, True) if cut else same_bits(a, b)

    assert all(map(same, mine, other))
    assert all(value._version > before for value, before in zip(mine, versions, strict=True))
    assert mine[0].isnan().any() == (not skip)
    again = buffers(dtype, 7)
    launch.update_running_(*again, mean, var, count, momentum, skip)
    assert all(map(same, again, other))
    assert all(map(same_bits, again, mine))


@pytest.mark.parametrize("counted", [True, False])
def test_buffers_that_the_kernels_cannot_write_to(launch: Any, counted: bool) -> None:
    x = torch.randn(9, 3, 5).to(DEVICE)
    mine, other = buffers(), buffers()
    mine[0] = torch.full((6,), 0.5, device=DEVICE)[::2]
    mine[2] = mine[2].to(torch.int32)
    for moved in (mine, other):
        running = Running(moved[0], moved[1], moved[2] if counted else None, 0.1, False)
        launch.train_forward(x, None, None, None, running, EPS, None, SLOPE)
    for a, b in zip(mine, other, strict=True):
        assert (a == b).all()
    assert int(mine[2]) == 6 + counted


def test_an_empty_batch_is_counted_and_moves_nothing(launch: Any) -> None:
    mine = buffers()
    launch.train_forward(
        torch.empty(0, 3, 4, device=DEVICE), None, None, None, Running(*mine, 0.1, False), EPS, None, SLOPE
    )
    assert (int(mine[2]), float(mine[0][0]), float(mine[1][0])) == (7, 0.5, 1.0)


@pytest.mark.parametrize("layout", ["channels_last", pytest.param("sliced", marks=slow)])
@pytest.mark.parametrize(("activation", "residual"), [(None, False), ("relu", True), ("gelu", True)])
def test_train_is_forward_and_backward(
    launch: Any, activation: str | None, residual: bool, layout: str
) -> None:
    data = Data((3, 3, 8), layout=layout, residual=residual)
    rule = (EPS, activation, SLOPE)
    y, mean, var, count, saved = launch.forward(*data.call(), None, 1, *rule)
    mine, bits, statistics = launch.train_forward(*data.call(), None, *rule)
    assert same_bits(mine, y)
    assert mine.stride() == torch.empty_like(data.x).stride()
    kept = saved if activation == "relu" else data.r
    assert (bits is None) == (activation != "relu")
    expected = launch.backward(
        data.dy,
        data.x,
        mean,
        var,
        count,
        data.weight,
        data.bias,
        kept if residual else saved,
        residual,
        None,
        *rule,
    )
    found = launch.train_backward(
        data.dy, data.x, statistics, data.weight, data.bias, kept if residual else None, residual, *rule
    )
    for a, b in zip(found, expected, strict=True):
        assert b.numel() == 0 if a is None else same_bits(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_eval(launch: Any, layout: str) -> None:
    data = Data((3, 3, 8), layout=layout, residual=True)
    running = torch.randn(3).to(DEVICE), (torch.rand(3) + 0.1).to(DEVICE)
    out = torch.empty_like(data.x) if layout != "sliced" else data.x
    wide = data.call(wide=True)
    mean, invstd = running[0].double()[None], (running[1].double()[None] + EPS).rsqrt()
    truth = reference.normalize(wide[0], mean, invstd, *wide[1:], None, "relu", SLOPE)[0]
    arguments = (*running, data.weight, data.bias, data.r, EPS, "relu", SLOPE)
    y, bits, statistics = launch.eval_forward(data.x, *arguments)
    near(y, truth, 1e-6)
    near(statistics, torch.cat([mean, invstd]), 1e-15)
    assert bits is not None
    into = launch.eval_forward(data.x, *arguments, out)[0]
    assert into is out
    assert same_bits(into, y)


def test_eval_through_the_layer_backward_and_in_place(launch: Any) -> None:
    layer = batchnorm.BatchNorm2d(3, activation="relu6", backend="triton").to(DEVICE)
    other = batchnorm.BatchNorm2d(3, activation="relu6", backend="reference").to(DEVICE)
    x = torch.randn(4, 3, 2, 5).to(DEVICE) + 1
    for model in (layer, other):
        model(x)
        model.eval()
    found = []
    for model in (layer, other):
        a = x.clone().requires_grad_()
        y = model(a)
        found.append((y, *torch.autograd.grad(y, [a, *model.parameters()], torch.ones_like(y))))
    for mine, truth in zip(*found, strict=True):
        near(mine, truth, 2e-6)
    with torch.inference_mode():
        into = x.clone()
        statistics = layer.running_mean, layer.running_var
        moved = batchnorm.batch_norm(into, *statistics, backend="triton", inplace=True)
        assert moved is into
        near(moved, batchnorm.batch_norm(x, *statistics, backend="reference"), 2e-6)
    assert int(layer.num_batches_tracked) == 1


def test_second_derivatives_go_through_the_formula() -> None:
    found = []
    for backend in ("triton", "reference"):
        x, r = (torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(n)).to(DEVICE) for n in range(2))
        x, r = x.double().requires_grad_(), r.double().requires_grad_()
        y = batchnorm.batch_norm(
            x, None, None, training=True, activation="leaky_relu", residual=r, backend=backend
        )
        first = torch.autograd.grad((y * y).sum(), [x, r], create_graph=True)
        found.append(torch.autograd.grad(sum((g * g).sum() for g in first), [x, r]))
    for mine, truth in zip(*found, strict=True):
        near(mine, truth, 1e-11)


def test_the_traced_door_gives_the_same() -> None:
    data = Data((5, 3, 7), residual=True, layout="channels_last")
    for mask in (None, torch.rand(5, 7, device=DEVICE) < 0.8):
        arguments = (*data.call(), mask, 1, EPS, "relu", SLOPE)
        mine = torch.ops.batchnorm.forward(*arguments, "triton")
        near(mine[0], torch.ops.batchnorm.forward(*arguments, "reference")[0], 1e-6)
    torch.library.opcheck(
        torch.ops.batchnorm.forward.default, (*data.call(), None, 1, EPS, "relu", SLOPE, "triton"),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize("activation", ["relu", pytest.param("silu", marks=slow)])
def test_torch_compile_finds_no_graph_break(activation: str) -> None:
    found = []
    for compiled in (False, True):
        layer = batchnorm.BatchNorm1d(3, activation=activation, backend="triton").to(DEVICE)
        run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
        x, r = (torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(n)).to(DEVICE) for n in range(2))
        x, r = x.requires_grad_(), r.requires_grad_()
        y = run(x, residual=r)
        gradients = torch.autograd.grad(y, [x, r, *layer.parameters()], torch.ones_like(y))
        assert int(layer.num_batches_tracked) == 1
        found.append((y, *gradients, layer.running_mean, layer.running_var))
    for mine, other in zip(*found, strict=True):
        near(mine, other, 1e-6)


@pytest.mark.parametrize("mask", [pytest.param(False, marks=slow), pytest.param(True, marks=slow)])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_every_operator_is_what_its_fake_says(activation: str | None, mask: bool) -> None:
    data = Data((4, 9, 7), residual=True)
    weights = torch.rand(4, 7, device=DEVICE) if mask else None
    x, w, b, r = (None if t is None else t.requires_grad_() for t in data.call())
    rule = (activation, SLOPE, "triton")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    operators = torch.ops.batchnorm
    torch.library.opcheck(operators.forward.default, (x, w, b, r, weights, 1, EPS, *rule), test_utils=checks)
    mean, invstd = torch.zeros(1, 9).double().to(DEVICE), torch.ones(1, 9).double().to(DEVICE)
    torch.library.opcheck(
        operators.normalize.default, (x, mean, invstd, w, b, r, weights, *rule), test_utils=checks
    )
    torch.library.opcheck(
        operators.moments.default,
        (x.detach(), weights, 2, "triton"),
        test_utils=("test_schema", "test_faketensor"),
    )
