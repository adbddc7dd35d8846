"""A channel with NaN or infinity stays alone, and nonfinite="skip" keeps it out of the running statistics."""

import itertools

import pytest
import torch
from helpers import lay_out, leaf, same_bits
from torch import Tensor

import batchnorm

BAD = [float("nan"), float("inf"), -float("inf")]
OTHERS = [0, 2, 3]


def step(
    x: Tensor, dy: Tensor, r: Tensor | None, activation: str | None, backend: str | None
) -> dict[str, Tensor]:
    layer = batchnorm.BatchNorm2d(4, activation=activation, backend=backend)
    leaves = {"x": leaf(x), "r": leaf(r), "weight": layer.weight, "bias": layer.bias}
    wanted = {name: value for name, value in leaves.items() if value is not None}
    y = layer(leaves["x"], leaves["r"])
    gradients = torch.autograd.grad(y, list(wanted.values()), dy)
    return {"output": y, "mean": layer.running_mean, "var": layer.running_var} | dict(
        zip(wanted, gradients, strict=True)
    )


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("place", ["input", "residual", "gradient"])
def test_other_channels_do_not_change_by_a_bit(place: str, layout: str, backend: str | None) -> None:
    for bad, activation in itertools.product(BAD, [None, "relu", "silu"]):
        x, r, dy = (lay_out(torch.randn(3, 4, 5, 6), layout) for _ in range(3))
        clean = step(x, dy, r, activation, backend)
        poisoned = {"input": x.clone(), "residual": r.clone(), "gradient": dy.clone()}
        poisoned[place][1, 1, 2, 3] = bad
        dirty = step(poisoned["input"], poisoned["gradient"], poisoned["residual"], activation, backend)
        for name, value in clean.items():
            axis = 1 if value.dim() == 4 else 0
            index = torch.tensor(OTHERS)
            assert same_bits(dirty[name].index_select(axis, index), value.index_select(axis, index)), name
        if place == "input":  # and the bad one says so
            assert dirty["output"][:, 1].isnan().all()
            assert dirty["mean"][1].isfinite().logical_not()
            assert dirty["var"][1].isnan()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("bad", BAD, ids=str)
def test_skip_leaves_the_bad_channels_statistics_alone(
    bad: float, backend: str | None, momentum: float | None
) -> None:
    layers = {
        name: batchnorm.BatchNorm1d(3, nonfinite=name, momentum=momentum, backend=backend)
        for name in ("skip", "propagate")
    }
    first, second = torch.randn(2, 8, 3)
    second[2, 1] = bad
    for layer in layers.values():
        layer(first)
    before = {name: value.clone() for name, value in layers["skip"].state_dict().items()}
    outputs = [layer(second) for layer in layers.values()]
    assert same_bits(*outputs)  # the output itself is the same
    after, plain = layers["skip"].state_dict(), layers["propagate"].state_dict()
    for name in ("running_mean", "running_var"):
        assert same_bits(after[name][1], before[name][1])
        torch.testing.assert_close(after[name][[0, 2]], plain[name][[0, 2]])
        assert not same_bits(after[name][0], before[name][0])
        assert not plain[name][1].isfinite()
    assert after["num_batches_tracked"].item() == plain["num_batches_tracked"].item() == 2


@pytest.mark.parametrize("backend", [None, "reference"])
def test_skip_keeps_statistics_finite_when_the_variance_overflows(backend: str | None) -> None:
    layer = batchnorm.BatchNorm1d(2, nonfinite="skip", backend=backend)
    x = torch.randn(8, 2)
    x[:, 0] *= 1e25  # finite values, a variance beyond float32
    layer(x)
    assert layer.running_var.isfinite().all()
    assert layer.running_var[1] != 1


def test_skip_of_finite_batches_changes_nothing() -> None:
    states = []
    for nonfinite in ("skip", "propagate"):
        torch.manual_seed(3)
        layer = batchnorm.BatchNorm2d(3, nonfinite=nonfinite, backend="reference")
        for _ in range(3):
            layer(torch.randn(4, 3, 2, 2))
        states.append(layer.state_dict())
    for name, value in states[0].items():
        assert same_bits(value, states[1][name])


def test_skip_of_an_empty_batch() -> None:
    layer = batchnorm.BatchNorm1d(3, nonfinite="skip", backend="reference")
    layer(torch.zeros(0, 3))
    assert layer.running_mean.tolist() == [0, 0, 0]
    assert layer.running_var.tolist() == [1, 1, 1]
    assert layer.num_batches_tracked.item() == 1


@pytest.mark.parametrize("mean", [float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_an_infinite_running_mean_in_evaluation(mean: float, activation: str | None) -> None:
    """As PyTorch: the channel is −∞ or ∞, or 0 behind relu, and not NaN."""
    x, running_mean, running_var = torch.randn(3, 4, 5, 6), torch.zeros(4), torch.ones(4)
    running_mean[1] = mean
    y = batchnorm.batch_norm(x, running_mean, running_var, activation=activation)
    pre = torch.nn.functional.batch_norm(x, running_mean, running_var)
    expected = pre.relu() if activation else pre
    assert torch.equal(y[:, 1], expected[:, 1])
    assert y[:, OTHERS].isfinite().all()
