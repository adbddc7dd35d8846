"""`accumulate` where something goes wrong, under wrappers and compilers, and what it refuses."""

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from accumulate_helpers import after, parts, same
from torch import Tensor, nn

import batchnorm
from batchnorm.ops import HELD


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert not HELD


@pytest.mark.parametrize("cls", [batchnorm.BatchNorm1d, nn.BatchNorm1d])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_drops_what_was_not_applied(cls: type[nn.Module], error: type[BaseException]) -> None:
    layer, batches = cls(3), parts((6, 3), (6, 4, 5))
    expected, objects = after(layer, batches[:2]), [id(buffer) for buffer in layer.buffers()]

    def loop() -> None:
        with batchnorm.accumulate(layer, 2):
            for x in batches:
                layer(x)
            raise error

    with pytest.raises(error):
        loop()
    same(layer, expected)
    assert [id(buffer) for buffer in layer.buffers()] == objects
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    layer(batches[0])
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize("cls", [batchnorm.BatchNorm1d, nn.BatchNorm1d])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_failed_does_not_count(cls: type[nn.Module], error: type[BaseException]) -> None:
    class Late(nn.Module):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            if self.fails:
                raise error
            return x

    net = nn.Sequential(cls(3), Late(), cls(3))
    batches = parts((6, 3), (6, 4))
    expected = after(net[0], batches)
    with batchnorm.accumulate(net, 2) as block:
        net(batches[0])
        net[1].fails = True
        with pytest.raises(error):
            net(torch.randn(9, 3))
        net[1].fails = False
        assert block.pending == 1
        net(batches[1])
    same(net[0], expected)


def test_ctrl_c_inside_of_a_layer_leaves_it_its_own_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.BatchNorm1d(3)
    before, objects = copy.deepcopy(layer.state_dict()), list(layer.buffers())

    def interrupted(*args: Any, **kwargs: Any) -> Tensor:
        raise KeyboardInterrupt

    def loop() -> None:
        with batchnorm.accumulate(layer, 2):
            layer(torch.randn(4, 3))
            monkeypatch.setattr(nn.functional, "batch_norm", interrupted)
            layer(torch.randn(4, 3))

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert all(a is b for a, b in zip(layer.buffers(), objects, strict=True))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_ctrl_c_while_the_update_is_computed_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(batchnorm.BatchNorm1d(3), batchnorm.BatchNorm1d(3))
    before, calls = copy.deepcopy(net.state_dict()), []
    moved = batchnorm.ops.moved

    def second_fails(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return moved(*args)

    monkeypatch.setattr(batchnorm.ops, "moved", second_fails)

    def loop() -> None:
        with batchnorm.accumulate(net, 1):
            net(torch.randn(4, 3))

    with pytest.raises(KeyboardInterrupt):
        loop()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def _write_buffers(module: nn.Module, args: Any) -> None:
    for buffer in module.buffers():
        buffer.add_(0)


def test_distributed_data_parallel(tmp_path: Path) -> None:
    with processes.alone(tmp_path):
        for given, cls in itertools.product(("wrapper", "network"), (batchnorm.BatchNorm1d, nn.BatchNorm1d)):
            net = nn.Sequential(cls(3), nn.Linear(3, 2))
            wrapped, batches = nn.parallel.DistributedDataParallel(net), parts((6, 3), (6, 4))
            # As it does with more processes: it writes rank 0's buffers before the network runs.
            wrapped.register_forward_pre_hook(_write_buffers)
            expected = after(net[0], batches)
            with batchnorm.accumulate(wrapped if given == "wrapper" else net, 2):
                for x in batches:
                    y = wrapped(x)
                    y.backward(torch.randn_like(y))
            same(net[0], expected)


@pytest.mark.parametrize("cls", [batchnorm.BatchNorm1d, nn.BatchNorm1d])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("given", ["wrapper", "network"])
def test_compiled(cls: type[nn.Module], before: bool, given: str) -> None:
    torch.compiler.reset()
    net = nn.Sequential(cls(3), nn.ReLU(), nn.Linear(3, 2))
    compiled = torch.compile(net, backend="aot_eager")
    batches = parts((6, 3), (6, 4, 5, 3))
    if before:
        compiled(batches[0])
    expected = copy.deepcopy(net[0])
    for group in (batches[:2], batches[2:]):
        expected.load_state_dict(after(expected, group))

    def loop() -> None:
        with batchnorm.accumulate(compiled if given == "wrapper" else net, 2):
            for x in batches:
                compiled(x).square().mean().backward()

    if before and cls is nn.BatchNorm1d:
        # A graph that is there already knows nothing of the hooks: an error, and no wrong numbers without a word.
        with pytest.raises(batchnorm.ModelError, match="moved by something else"):
            loop()
        return
    loop()
    same(net[0], expected.state_dict())
    compiled(batches[0])
    assert net[0].num_batches_tracked == expected.num_batches_tracked + 1


def test_a_compiled_call_that_no_hook_saw_last() -> None:
    torch.compiler.reset()
    net, x = nn.Sequential(nn.BatchNorm1d(3)), torch.randn(6, 3)
    compiled = torch.compile(net, backend="aot_eager")
    compiled(x)
    with pytest.raises(batchnorm.ModelError, match="moved by something else"), batchnorm.accumulate(net, 2):
        net(x)
        compiled(x)


def test_compiled_without_graph_breaks_is_an_error() -> None:
    torch.compiler.reset()
    net = nn.Sequential(batchnorm.BatchNorm1d(3))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 3)
    compiled(x)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(torch._dynamo.exc.Unsupported, match="uncompiled"), batchnorm.accumulate(compiled, 2):
        compiled(x)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    compiled(x)
    assert net[0].num_batches_tracked == 2


def test_copies_and_pickles_take_no_part() -> None:
    net = nn.Sequential(batchnorm.BatchNorm1d(3), nn.BatchNorm1d(3))
    with batchnorm.accumulate(net, 2) as block:
        net(torch.randn(4, 3))
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            other(torch.randn(4, 3))
            assert [int(norm.num_batches_tracked) for norm in other] == [1, 1]
        assert block.pending == 1
    assert [int(norm.num_batches_tracked) for norm in net] == [1, 1]


def refused(model: nn.Module, match: str) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(batchnorm.ModelError, match=match):
        batchnorm.accumulate(model, 2)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_what_is_refused() -> None:
    net = nn.Sequential(batchnorm.BatchNorm1d(3), nn.Linear(3, 3))
    for k, error in (
        (0, batchnorm.InputError),
        (True, batchnorm.InputTypeError),
        (2.0, batchnorm.InputTypeError),
    ):
        with pytest.raises(error, match="accumulate: k"):
            batchnorm.accumulate(net, k)
    with pytest.raises(batchnorm.InputTypeError, match="accumulate: model"):
        batchnorm.accumulate("net", 2)

    class Own(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(3))
            self.register_buffer("num_batches_tracked", torch.tensor(0))

    refused(nn.Sequential(Own(3)), "0: got a Own, whose forward is its own")
    refused(nn.Sequential(net, Other()), "1: got a Other, whose forward is its own")
    refused(nn.Sequential(nn.SyncBatchNorm(3)), "a SyncBatchNorm")
    refused(nn.Sequential(net, nn.InstanceNorm1d(3, track_running_stats=True)), "InstanceNorm1d")
    refused(nn.DataParallel(net), "DataParallel")
    refused(nn.Linear(3, 3), "none")
    refused(batchnorm.freeze(net).model, "none")
    with pytest.raises(batchnorm.ModelError, match="not seen its shape"):
        batchnorm.accumulate(nn.LazyBatchNorm1d(), 2)


def inside(net: nn.Module, match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(batchnorm.ModelError, match=match), batchnorm.accumulate(net, 2):
        call()


@pytest.mark.parametrize("cls", [batchnorm.BatchNorm1d, nn.BatchNorm1d])
def test_what_is_refused_inside(cls: type[nn.Module]) -> None:
    net, x = nn.Sequential(cls(3), nn.Linear(3, 3)), torch.randn(4, 3)
    block = batchnorm.accumulate(net, 2)
    inside(net, "one at a time", lambda: batchnorm.accumulate(net[0], 2).__enter__())
    with block:
        inside(net, "one at a time", lambda: None)
        with pytest.raises(batchnorm.ModelError, match="one at a time"):
            block.__enter__()
    inside(net, "outside of the model's forward", lambda: net[0](x))

    def load() -> None:
        state = copy.deepcopy(net.state_dict())
        handle = net[1].register_forward_hook(lambda *_: net.load_state_dict(state) and None)
        try:
            net(x)
        finally:
            handle.remove()

    inside(net, "moved by something else", load)
    inside(net, "other buffers", lambda: net.double()(x.double()))
    net.float()
    net(x)
    with pytest.raises(batchnorm.ModelError, match="moved by something else"), batchnorm.accumulate(net, 2):
        net[0].running_mean.add_(1)  # and not one forward was seen


def test_function_transforms_are_refused() -> None:
    net, x = nn.Sequential(batchnorm.BatchNorm1d(3)), torch.randn(4, 3)
    inside(net, "torch.func", lambda: torch.func.grad(lambda x: net(x).square().sum())(x))


def test_loading_between_forwards_is_the_users_own_business() -> None:
    layer, x = batchnorm.BatchNorm1d(3), torch.randn(6, 3)
    other = batchnorm.BatchNorm1d(3)
    other(torch.randn(6, 3) + 5)
    expected = after(other, [x, x])
    with batchnorm.accumulate(layer, 2):
        layer(x)
        layer.load_state_dict(other.state_dict())
        layer(x)
    same(layer, expected)


def test_what_has_no_statistics_of_batches_is_passed_over_and_what_moves_them_itself_refused() -> None:
    virtual = batchnorm.VirtualBatchNorm(3)
    with batchnorm.reference_batch(virtual):
        virtual(torch.randn(8, 3))
    net = nn.Sequential(virtual, batchnorm.BatchNorm1d(3))
    before = virtual.running_mean.clone()
    with batchnorm.accumulate(net, 2):
        for x in parts((6, 3), (6, 4)):
            net(x)
    assert net[1].num_batches_tracked == 1
    assert torch.equal(virtual.running_mean, before)
    with pytest.raises(batchnorm.ModelError, match="It moves its statistics itself"):
        batchnorm.accumulate(nn.Sequential(batchnorm.WhitenedBatchNorm(4), net[1]), 2)
