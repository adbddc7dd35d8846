"""What a review found: arguments that depend on one another, graphs in buffers, modes, aliases, odd states."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm

DOUBLE = torch.float64


def doubly(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of the squared norm of the gradient: all of it under create_graph."""
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    return torch.cat([first.detach().flatten(), second.flatten()])


def normalized(x: Tensor, **options: object) -> Tensor:
    return batchnorm.batch_norm(x, None, None, training=True, backend="reference", **options)  # type: ignore[arg-type]


def plain(x: Tensor, residual: Tensor) -> Tensor:
    return F.silu(F.batch_norm(x, None, None, training=True) + residual)


@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.tanh() * 2], ids=["itself", "made from it"])
def test_second_derivatives_when_the_residual_depends_on_the_input(make: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(5, 3, dtype=DOUBLE, requires_grad=True)
    weights = torch.randn(5, 3, dtype=DOUBLE)
    ours = doubly(lambda x: (weights * normalized(x, residual=make(x), activation="silu")).sum(), x)
    torchs = doubly(lambda x: (weights * plain(x, make(x))).sum(), x)
    torch.testing.assert_close(ours, torchs, rtol=1e-9, atol=1e-11)


def test_second_derivatives_when_the_weight_depends_on_the_input_and_is_the_bias() -> None:
    x = torch.randn(5, 3, dtype=DOUBLE, requires_grad=True)
    weights = torch.randn(5, 3, dtype=DOUBLE)

    def torchs(x: Tensor) -> Tensor:
        w = x.mean(0)
        return (weights * F.batch_norm(x, None, None, w, w, training=True)).sum()

    def ours(x: Tensor) -> Tensor:
        w = x.mean(0)
        return (weights * normalized(x, weight=w, bias=w)).sum()

    torch.testing.assert_close(doubly(ours, x), doubly(torchs, x), rtol=1e-9, atol=1e-11)


def test_second_derivatives_of_a_layer_that_is_used_twice() -> None:
    x = torch.randn(6, 3, dtype=DOUBLE, requires_grad=True)
    dy = torch.randn(6, 3, dtype=DOUBLE)
    found = []
    for layer in (
        batchnorm.BatchNorm1d(3, dtype=DOUBLE, backend="reference"),
        nn.BatchNorm1d(3, dtype=DOUBLE),
    ):
        loss = (dy * layer(torch.tanh(layer(x)))).sum()
        (first,) = torch.autograd.grad(loss, layer.weight, create_graph=True)
        found.append(torch.cat([first.detach(), torch.autograd.grad(first.square().sum(), layer.weight)[0]]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


def test_traced_training_keeps_the_buffers_out_of_the_graph() -> None:
    layer = batchnorm.BatchNorm1d(3, backend="reference")
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for _ in range(2):
        compiled(torch.randn(4, 3, requires_grad=True))
    assert not layer.running_mean.requires_grad
    assert not layer.running_var.requires_grad
    assert copy.deepcopy(layer).num_batches_tracked == 2


def test_running_statistics_carry_no_gradient_under_a_transform() -> None:
    x = torch.randn(6, 3, dtype=DOUBLE)

    def loss(x: Tensor, backend: str) -> Tensor:
        mean, var = torch.zeros(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)
        batchnorm.batch_norm(x, mean, var, training=True, backend=backend)
        return batchnorm.batch_norm(x, mean, var, backend=backend).pow(3).sum()

    grads = [torch.func.grad(loss)(x, backend) for backend in ("reference", "aten")]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_a_symbolically_traced_model_still_switches_its_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 3), batchnorm.BatchNorm1d(3, activation="relu"))
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(5, 4)
    traced(x)
    assert torch.equal(traced.eval()(x), model.eval()(x))
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("options", [{"momentum": None}, {"nonfinite": "skip"}], ids=["average", "skip"])
def test_export_of_training_with_a_dynamic_batch(options: dict[str, object]) -> None:
    layer = batchnorm.BatchNorm1d(3, **options)  # type: ignore[arg-type]
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(layer, (torch.randn(4, 3),), dynamic_shapes={"input": {0: batch}})
    x = torch.randn(7, 3)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_the_output_may_be_changed_in_place() -> None:
    x = torch.randn(4, 3, dtype=DOUBLE, requires_grad=True)
    torch.relu_(normalized(x)).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_no_gradient_is_an_alias() -> None:
    x, dy = torch.randn(4, 3, dtype=DOUBLE), torch.randn(4, 3, dtype=DOUBLE)
    mean, var, count = (
        torch.zeros(1, 3, dtype=DOUBLE),
        torch.ones(1, 3, dtype=DOUBLE),
        torch.full((1, 1), 4.0, dtype=DOUBLE),
    )
    kept = torch.empty(0, dtype=torch.uint8)
    arguments = (dy, x, mean, var, count, None, None, kept, True, None, 1e-5, None, 0.01, "reference")
    torch.library.opcheck(torch.ops.batchnorm.backward.default, arguments)


def test_running_statistics_are_rounded_once() -> None:
    running = torch.ones(1), torch.ones(1)
    x = torch.tensor([[-8.0], [-10.0]])
    batchnorm.batch_norm(x, *running, training=True, backend="reference")
    assert running[0].item() == torch.tensor(0.9 * 1 + 0.1 * -9, dtype=DOUBLE).float().item()


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_a_nan_of_the_residual_lets_the_gradient_through_as_in_torch(activation: str) -> None:
    x, dy = torch.randn(4, 2), torch.randn(4, 2)
    grads = []
    for backend in ("reference", "aten"):
        residual = torch.zeros(4, 2).index_put_(
            (torch.tensor(1), torch.tensor(0)), torch.tensor(float("nan"))
        )
        residual.requires_grad_()
        y = batchnorm.batch_norm(
            x, None, None, training=True, activation=activation, residual=residual, backend=backend
        )
        y.backward(dy)
        grads.append(residual.grad)
    torch.testing.assert_close(*grads)


def test_the_plain_average_needs_a_counter() -> None:
    with pytest.raises(batchnorm.InputTypeError, match="momentum"):
        batchnorm.batch_norm(torch.randn(4, 2), torch.zeros(2), torch.ones(2), training=True, momentum=None)  # type: ignore[arg-type]
    ours, torchs = batchnorm.BatchNorm1d(2, momentum=None), nn.BatchNorm1d(2, momentum=None)
    for layer in (ours, torchs):
        layer.num_batches_tracked = None
        layer(torch.randn(4, 2))
        assert torch.equal(layer.running_mean, torch.zeros(2))


def test_training_between_an_eval_forward_and_its_backward() -> None:
    layer = batchnorm.BatchNorm1d(3, dtype=DOUBLE, backend="reference")
    x = torch.randn(4, 3, dtype=DOUBLE, requires_grad=True)
    y = layer.eval()(x)
    layer.train()(torch.randn(4, 3, dtype=DOUBLE))
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((4, 3), 1 / (1 + 1e-5) ** 0.5, dtype=DOUBLE))


def test_a_layer_that_became_ours_works() -> None:
    layer = nn.BatchNorm1d(3)
    layer.__class__ = batchnorm.BatchNorm1d
    assert layer(torch.randn(4, 3)).shape == (4, 3)
    assert "activation" not in repr(layer)


@pytest.mark.parametrize("options", [{"residual": [1.0]}, {"mask": [True]}, {"weight": [1.0, 1.0]}], ids=list)
def test_what_is_no_tensor_is_named(options: dict[str, object]) -> None:
    (name,) = options
    with pytest.raises(batchnorm.InputTypeError, match=f"{name}: got list"):
        batchnorm.batch_norm(torch.randn(4, 2), None, None, training=True, **options)  # type: ignore[arg-type]


def test_an_unknown_backend_is_refused_when_the_layer_is_made() -> None:
    with pytest.raises(batchnorm.InputError, match="'cuda'"):
        batchnorm.BatchNorm1d(3, backend="cuda")
