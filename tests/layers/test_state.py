"""What a layer is besides its numbers: constructor, state_dict, buffers, repr, lazy layers."""

import copy
import inspect
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from helpers import same_bits
from torch import nn

import batchnorm

PAIRS = [
    (batchnorm.BatchNorm1d, nn.BatchNorm1d, (4, 3, 5)),
    (batchnorm.BatchNorm2d, nn.BatchNorm2d, (4, 3, 5, 2)),
    (batchnorm.BatchNorm3d, nn.BatchNorm3d, (4, 3, 5, 2, 3)),
]
LAZY = [
    (batchnorm.LazyBatchNorm1d, nn.LazyBatchNorm1d, batchnorm.BatchNorm1d, (4, 3, 5)),
    (batchnorm.LazyBatchNorm2d, nn.LazyBatchNorm2d, batchnorm.BatchNorm2d, (4, 3, 5, 2)),
    (batchnorm.LazyBatchNorm3d, nn.LazyBatchNorm3d, batchnorm.BatchNorm3d, (4, 3, 5, 2, 3)),
]
ids = [ours.__name__ for ours, _, _ in PAIRS]


@pytest.mark.parametrize(("ours", "torchs", "shape"), PAIRS, ids=ids)
def test_is_a_torch_batch_norm_with_torchs_constructor(
    ours: Any, torchs: Any, shape: tuple[int, ...]
) -> None:
    assert issubclass(ours, torchs)
    mine = inspect.signature(ours).parameters
    for name, parameter in inspect.signature(torchs).parameters.items():
        assert (mine[name].kind, mine[name].default) == (parameter.kind, parameter.default), name
    extras = [mine[name] for name in mine if name not in inspect.signature(torchs).parameters]
    assert {extra.name for extra in extras} >= {"activation", "nonfinite", "backend"}
    assert all(extra.kind is inspect.Parameter.KEYWORD_ONLY for extra in extras)
    assert list(inspect.signature(ours.forward).parameters) == [
        "self", "input", "residual", "mask", "inplace",
    ]  # fmt: skip
    x = torch.randn(shape)
    assert torch.equal(ours(3).eval()(input=x), torchs(3).eval()(input=x))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eps": 1e-3, "momentum": None},
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
    ],
    ids=str,
)
@pytest.mark.parametrize(("ours", "torchs", "shape"), PAIRS, ids=ids)
def test_state_dict_both_ways(
    ours: Any, torchs: Any, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    source, target = ours(3, **options), torchs(3, **options)
    for a, b in ((source, target), (target, source)):
        with torch.no_grad():
            for value in a.state_dict().values():
                value.copy_(torch.randint(1, 9, value.shape))
        assert list(a.state_dict()) == list(b.state_dict())
        assert a.state_dict()._metadata[""]["version"] == b.state_dict()._metadata[""]["version"] == 2
        b.load_state_dict(a.state_dict(), strict=True)
        for name, value in a.state_dict().items():
            assert same_bits(value, b.state_dict()[name]), name
    assert repr(source) == repr(target)
    assert source.extra_repr() == target.extra_repr()
    x = torch.randn(shape)
    torch.testing.assert_close(source(x), target(x))


def test_loads_a_version_1_checkpoint_as_torch_does() -> None:
    state = nn.BatchNorm2d(3).state_dict()
    state["running_mean"] += 2
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    layer = batchnorm.BatchNorm2d(3)
    layer.load_state_dict(state, strict=True)
    assert layer.running_mean.tolist() == [2, 2, 2]
    assert layer.num_batches_tracked.item() == 0


def test_checkpoint_with_wrong_keys_is_refused_as_by_torch() -> None:
    with pytest.raises(RuntimeError, match="Missing key"):
        batchnorm.BatchNorm2d(3).load_state_dict(nn.BatchNorm2d(3, affine=False).state_dict(), strict=True)


def test_repr_names_every_extra_that_is_set() -> None:
    layer = batchnorm.BatchNorm2d(
        3, activation="leaky_relu", negative_slope=0.3, nonfinite="skip", backend="reference"
    )
    for part in ("3, eps=1e-05", "leaky_relu", "0.3", "skip", "reference"):
        assert part in layer.extra_repr()
    assert "activation" not in batchnorm.BatchNorm2d(3).extra_repr()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_momentum_none_is_the_plain_average(backend: str | None) -> None:
    layer = batchnorm.BatchNorm1d(3, momentum=None, backend=backend)
    batches = torch.randn(5, 8, 3) * torch.arange(1, 6).reshape(5, 1, 1)
    for batch in batches:
        layer(batch)
    assert layer.num_batches_tracked.item() == 5
    torch.testing.assert_close(layer.running_mean, batches.mean(1).mean(0))
    torch.testing.assert_close(layer.running_var, batches.var(1).mean(0))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("start", [True, False])
def test_toggled_track_running_stats(start: bool, backend: str | None) -> None:
    ours = batchnorm.BatchNorm1d(3, track_running_stats=start, backend=backend)
    torchs = nn.BatchNorm1d(3, track_running_stats=start)
    for track, training in itertools.product([not start, start], [True, False]):
        if track and not start:
            continue  # torch itself has no buffers to update then, and fails
        for layer in (ours, torchs):
            layer.track_running_stats = track
            layer.train(training)
        x = torch.randn(6, 3)
        torch.testing.assert_close(ours(x), torchs(x))
        for name, value in torchs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value)


def test_switching_tracking_on_without_buffers_does_as_torch() -> None:
    outcomes = []
    for layer in (
        batchnorm.BatchNorm1d(3, track_running_stats=False),
        nn.BatchNorm1d(3, track_running_stats=False),
    ):
        layer.track_running_stats = True
        torch.manual_seed(1)
        outcomes.append(layer(torch.randn(6, 3)))
        assert layer.num_batches_tracked is None
    torch.testing.assert_close(*outcomes)


def test_reset_running_stats_and_parameters() -> None:
    layer, torchs = batchnorm.BatchNorm1d(3), nn.BatchNorm1d(3)
    for one in (layer, torchs):
        one(torch.randn(6, 3))
        with torch.no_grad():
            one.weight.mul_(3)
        one.reset_parameters()
    for name, value in torchs.state_dict().items():
        assert same_bits(layer.state_dict()[name], value), name


@pytest.mark.parametrize(("lazy", "torchs", "becomes", "shape"), LAZY, ids=[row[0].__name__ for row in LAZY])
def test_lazy_layer_becomes_the_plain_one(
    lazy: Any, torchs: Any, becomes: Any, shape: tuple[int, ...]
) -> None:
    layer = lazy(eps=1e-3, momentum=0.3, activation="relu", nonfinite="skip", backend="reference")
    other = torchs(eps=1e-3, momentum=0.3)
    assert isinstance(layer, torchs)
    assert isinstance(layer.weight, nn.UninitializedParameter)
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), other(x).relu())
    assert type(layer) is becomes
    assert layer.num_features == 3
    assert (layer.activation, layer.nonfinite, layer.backend) == ("relu", "skip", "reference")
    for name, value in other.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value)


def test_lazy_layer_takes_shape_from_a_checkpoint() -> None:
    source = nn.BatchNorm2d(7)
    source(torch.randn(3, 7, 2, 2))
    layer = batchnorm.LazyBatchNorm2d()
    layer.load_state_dict(source.state_dict(), strict=True)
    x = torch.randn(2, 7, 3, 3)
    torch.testing.assert_close(layer.eval()(x), source.eval()(x))
    assert type(layer) is batchnorm.BatchNorm2d


@pytest.mark.parametrize(
    "options", [{"affine": False}, {"bias": False}, {"track_running_stats": False}], ids=str
)
def test_lazy_layer_options(options: dict[str, Any]) -> None:
    layer, other = batchnorm.LazyBatchNorm1d(**options), nn.LazyBatchNorm1d(**options)
    x = torch.randn(5, 3)
    torch.testing.assert_close(layer(x), other(x))
    assert list(layer.state_dict()) == list(other.state_dict())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_equal_and_apart(way: str) -> None:
    layer = batchnorm.BatchNorm2d(
        3, activation="silu", negative_slope=0.3, nonfinite="skip", backend="reference"
    )
    x, residual = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    layer(x)
    if way == "deepcopy":
        twin = copy.deepcopy(layer)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert type(twin) is type(layer)
    assert repr(twin) == repr(layer)
    assert same_bits(twin(x, residual), layer(x, residual))
    assert same_bits(twin.running_var, layer.running_var)
    twin(x)
    assert twin.num_batches_tracked.item() == layer.num_batches_tracked.item() + 1


def test_moves_like_any_module() -> None:
    layer = batchnorm.BatchNorm2d(3, activation="relu")
    assert layer.double().weight.dtype == torch.float64
    assert layer.half().running_var.dtype == torch.float16
    assert layer.num_batches_tracked.dtype == torch.long
    meta = batchnorm.BatchNorm2d(3, device="meta")
    assert meta.weight.is_meta
    assert meta(torch.empty(2, 3, 4, 4, device="meta")).shape == (2, 3, 4, 4)
