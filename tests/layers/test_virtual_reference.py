"""`reference_batch` and the reference a VirtualBatchNorm keeps: its graph, its life, copies, tools, the compiler."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from helpers import leaf, same_bits
from torch import Tensor, nn

import batchnorm
from batchnorm import InputTypeError, ModelError, VirtualBatchNorm, reference_batch


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        VirtualBatchNorm(4, activation="relu"),
        nn.Conv2d(4, 4, 3),
        VirtualBatchNorm(4),
    )


def images(samples: int) -> Tensor:
    return torch.randn(samples, 3, 8, 8)


def shown(net: nn.Module, reference: Tensor) -> nn.Module:
    with torch.no_grad(), reference_batch(net):
        net(reference)
    return net


def test_every_layer_sees_the_reference_at_its_depth() -> None:
    net, reference = network(), images(6)
    with reference_batch(net):
        first = net(reference)
    other = nn.Sequential(net[0], nn.BatchNorm2d(4), nn.ReLU(), net[2], nn.BatchNorm2d(4))
    torch.testing.assert_close(first, other(reference))
    hidden = net[2](nn.functional.relu(other[1](net[0](reference))))
    torch.testing.assert_close(net[3].running_mean, hidden.mean((0, 2, 3)))
    torch.testing.assert_close(net[3].running_var, hidden.var((0, 2, 3), correction=0))


def test_gradients_reach_the_weights_through_the_reference() -> None:
    net, reference, x = network(), images(6), images(2)
    dy = torch.randn(2, 4, 4, 4)
    with reference_batch(net):
        net(reference)
    whole = torch.autograd.grad(net(x), net[0].weight, dy)[0]
    with reference_batch(net, graph=False):
        net(reference)
    part = torch.autograd.grad(net(x), net[0].weight, dy)[0]
    assert not torch.allclose(whole, part, rtol=1e-2)
    # A step along one direction, with the reference run again and with the old statistics.
    direction, step = torch.randn_like(net[0].weight), 1e-3
    for gradient, again in ((whole, True), (part, False)):
        values = []
        for sign in (1, -1):
            twin = copy.deepcopy(shown(net, reference)).double()
            with torch.no_grad():
                twin[0].weight.add_(sign * step * direction.double())
            if again:
                shown(twin, reference.double())
            values.append((twin(x.double()) * dy).sum().item())
        slope = (values[0] - values[1]) / (2 * step)
        assert abs(slope - (gradient * direction).sum().item()) < 2e-2 * abs(slope)


def test_a_training_loop() -> None:
    net, reference = network(), images(6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        with reference_batch(net):
            net(reference)
        optimizer.zero_grad()
        net(images(2)).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


def test_backward_a_second_time_says_what_to_do() -> None:
    net, reference = network(), images(6)
    with reference_batch(net):
        net(reference)
    net(images(2)).square().mean().backward(retain_graph=True)
    net(images(2)).square().mean().backward()
    with pytest.raises(ModelError, match=r"a second one.*Run it again before each training step"):
        net(images(2)).square().mean().backward()
    with torch.no_grad():
        net(images(2))
    shown(net, reference)
    for _ in range(2):
        net(images(2)).square().mean().backward()


def test_no_graph_is_kept_without_need() -> None:
    net, reference = network(), images(6)
    for options, wanted in (({}, True), ({"graph": False}, False)):
        with reference_batch(net, **options):
            net(reference)
        x = images(2)
        y = net[1].eval()(torch.randn(2, 4, 3, 3))
        assert (net[1]._held is not None) is wanted
        assert y.requires_grad
        assert net(x).shape == (2, 4, 4, 4)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies_have_the_reference_without_its_graph(way: str) -> None:
    net, x = network(), images(2)
    with reference_batch(net):
        net(images(6))
    if way == "deepcopy":
        twin = copy.deepcopy(net)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(net))
    elif way == "torch.save":
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    else:
        twin = network()
        twin.load_state_dict(net.state_dict(), strict=True)
    assert repr(twin) == repr(net)
    torch.testing.assert_close(twin(x), net(x))
    for _ in range(2):
        twin(x).sum().backward()
    shown(twin, images(3))
    assert (net[1].num_batches_tracked.item(), twin[1].num_batches_tracked.item()) == (6, 3)


def test_what_makes_the_buffers_count() -> None:
    net, x = network(), images(2)
    with reference_batch(net):
        net(images(6))
    stale, fresh = net.state_dict(), shown(copy.deepcopy(net), images(5))
    net.load_state_dict(fresh.state_dict())
    torch.testing.assert_close(net(x), fresh(x))
    net.load_state_dict(stale)
    with reference_batch(net):
        net(images(6))
    assert net[1]._held is not None
    assert net.double()[1]._held is None  # its tensors are not moved with the buffers
    assert net(x.double()).dtype == torch.float64
    net[1].reset_running_stats()
    with pytest.raises(ModelError, match=r"VirtualBatchNorm.*no reference batch"):
        net(x.double())


def test_a_new_reference_leaves_earlier_calls_alone() -> None:
    layer, dy = shown(VirtualBatchNorm(3, dtype=torch.float64), torch.randn(6, 3)), torch.randn(2, 3)
    x = leaf(torch.randn(2, 3, dtype=torch.float64))
    (expected,) = torch.autograd.grad(layer(x), x, dy.double())
    y = layer(x)
    shown(layer, torch.randn(6, 3))
    assert same_bits(torch.autograd.grad(y, x, dy.double())[0], expected)


def test_an_exception_leaves_the_old_reference() -> None:
    net, x = shown(network(), images(6)), images(2)
    y = net(x)
    with pytest.raises(ZeroDivisionError), reference_batch(net):
        net(images(4))
        raise ZeroDivisionError
    assert same_bits(net(x), y)
    assert net[1].num_batches_tracked == 6


def test_wrong_uses_of_the_block() -> None:
    net = network()
    with pytest.raises(InputTypeError, match=r"a torch\.nn\.Module"), reference_batch(3):
        pass
    with pytest.raises(ModelError, match="no VirtualBatchNorm"), reference_batch(nn.Linear(2, 2)):
        pass
    with pytest.raises(ModelError, match="Call the model inside"), reference_batch(net):
        pass
    with pytest.raises(ModelError, match="one block at a time"), reference_batch(net), reference_batch(net):
        pass
    with pytest.raises(ModelError, match="a second call"), reference_batch(net):
        net(images(4))
        net(images(4))
    assert not any(layer._open for layer in (net[1], net[3]))
    shared = VirtualBatchNorm(4)
    with pytest.raises(ModelError, match="a layer of its own"), reference_batch(shared):
        nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.Conv2d(4, 4, 1), shared)(images(2))


def test_convert_there_and_back() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), batchnorm.BatchNorm2d(4))
    net(images(9))
    changes = batchnorm.convert(net, "virtual")
    virtual = changes.model
    assert [type(virtual[i]) for i in (1, 3)] == [VirtualBatchNorm] * 2
    for name, value in net.state_dict().items():
        assert same_bits(virtual.state_dict()[name], value), name
    virtual(images(2))  # by the statistics of one batch
    with reference_batch(virtual):
        virtual(images(6))
    virtual(images(2)).sum().backward()
    back = batchnorm.convert(virtual, "torch").model
    assert [type(back[i]) for i in (1, 3)] == [nn.BatchNorm2d] * 2
    assert back[1].momentum == 0.1
    back(images(4))
    copy.deepcopy(batchnorm.convert(virtual, "batchnorm", inplace=True).model)(images(4))
    fresh = batchnorm.convert(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), "virtual").model
    with pytest.raises(ModelError, match="no reference batch"):
        fresh(torch.randn(2, 3))
    shown(fresh, torch.randn(8, 3))
    assert fresh(torch.randn(1, 3)).shape == (1, 3)
    for graph in (True, False):
        a = leaf(torch.randn(8, 3))
        with reference_batch(fresh, graph=graph):
            fresh(a)
        y = fresh(torch.randn(2, 3))
        (da,) = torch.autograd.grad(y, a, torch.randn(2, 3), allow_unused=True)
        assert (da is not None) is graph


def test_what_tools_do_with_it() -> None:
    net, x = shown(network(), images(6)).eval(), images(2)
    y = net(x)
    for operation in (batchnorm.fold, batchnorm.fuse, batchnorm.absorb_bias, batchnorm.remove):
        changes = operation(net)
        assert not changes.changed
        torch.testing.assert_close(changes.model(x), y)
    with pytest.raises(ModelError, match="those of its reference batch"):
        batchnorm.recalibrate(net, [x])
    frozen = batchnorm.freeze(net).model
    with torch.no_grad(), reference_batch(frozen):
        frozen(images(4))
    torch.testing.assert_close(frozen(x), y)


# What PyTorch's compiler does itself, to functions of autograd and to tensors with a graph.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole(backend: str) -> None:
    torch.compiler.reset()
    eager, mask = VirtualBatchNorm(4, activation="silu"), torch.rand(3, 5) < 0.8
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, fullgraph=True, backend=backend)
    reference, x, r, dy = torch.randn(6, 4, 5), *torch.randn(3, 3, 4, 5)
    for graph in (True, False):
        outcomes = []
        for layer, call in ((eager, eager), (traced, compiled)):
            a, b = leaf(reference), leaf(x)
            with reference_batch(layer, graph=graph):
                call(a)
            y = call(b, r, mask)
            wanted = (b, layer.weight, *((a,) if graph else ()))
            outcomes.append((y, *torch.autograd.grad(y, wanted, dy), *layer.buffers()))
        for mine, other in zip(*outcomes, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_without_a_reference() -> None:
    torch.compiler.reset()
    compiled = torch.compile(VirtualBatchNorm(4), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="no reference batch"):
        compiled(torch.randn(3, 4))
    torch.compiler.reset()


@pytest.mark.parametrize("graph", [True, False])
def test_export(graph: bool) -> None:
    net, x = network(), images(2)
    with reference_batch(net, graph=graph):
        net(images(6))
    program: Any = torch.export.export(net.eval(), (x,))
    torch.testing.assert_close(program.module()(x), net(x))
    assert [node.target for node in torch.fx.symbolic_trace(net).graph.nodes][1:5] == ["0", "1", "2", "3"]


def test_a_frozen_layer_takes_its_reference_for_a_constant() -> None:
    net = nn.Sequential(nn.Linear(2, 3), batchnorm.VirtualBatchNorm(3))
    with batchnorm.reference_batch(net):
        net(torch.randn(8, 2))
    batchnorm.freeze(net, inplace=True)
    for _ in range(2):
        net(torch.randn(4, 2)).square().sum().backward()
    assert net[0].weight.grad is not None


def test_what_is_held_is_given_up_where_the_buffers_say_something_else() -> None:
    net, x = nn.Sequential(nn.Linear(2, 3), batchnorm.VirtualBatchNorm(3)), torch.randn(4, 2)
    with batchnorm.reference_batch(net):
        net(torch.randn(8, 2))
    others = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    others["1.running_mean"] = others["1.running_mean"] + 100
    before = net(x)
    assert not torch.allclose(torch.func.functional_call(net, others, (x,)), before)
    net[1].running_mean.add_(100)
    torch.testing.assert_close(net(x), torch.func.functional_call(net, others, (x,)))
    batchnorm.convert(net, batchnorm.BatchNorm1d, inplace=True)
    assert type(net[1]) is batchnorm.BatchNorm1d
    assert not {"_held", "_marks", "_open"} & vars(net[1]).keys()
