"""WhitenedBatchNorm as a module: what it refuses, its state, the compiler, transforms, and what tools do with it."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from helpers import leaf, same_bits
from torch import nn
from torch.func import grad, vmap
from whitened_helpers import F64, METHODS, correlated, made

import batchnorm
from batchnorm import InputError, InputTypeError, WhitenedBatchNorm

both = pytest.mark.parametrize("method", METHODS)


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
