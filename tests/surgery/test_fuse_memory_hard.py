"""fuse(memory="recompute"): changes in place, what lives how long, and what only looks like an output."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from helpers import same_bits
from recompute_helpers import X, check_same, pair
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import batchnorm


class Fork(nn.Module):
    """One output, two convolutions."""

    def __init__(self, between: Callable[[Tensor], object] = lambda y: None) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.left, self.right, self.between = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 3, padding=1), between
        self.values: dict[str, Tensor] = {}

    def forward(self, x):
        x = self.conv(x)
        y = self.bn(x)
        self.between(y)
        self.values = {"input": x, "output": y}
        return self.left(y) + self.right(y)


def layers(between: Callable[[Tensor], object] = lambda y: None) -> tuple[Fork, Fork]:
    return pair(Fork(between))


def test_two_that_saved_one_output() -> None:
    keeping, recomputing = layers()
    check_same(keeping, recomputing)
    recomputing.values = {}
    recomputing.between = lambda y: gone.append(StorageWeakRef(y.untyped_storage()))
    gone: list[StorageWeakRef] = []
    y = recomputing(X)
    recomputing.values = {}
    assert gone[0].expired()
    assert y.grad_fn is not None


@pytest.mark.parametrize("which", ["input", "output"])
def test_a_change_in_place_is_noticed(which: str) -> None:
    for net in layers():
        loss = net(X).sum()
        with torch.no_grad():
            net.values[which].view(-1)[0] = 7
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_an_input_that_changed_is_not_computed_with() -> None:
    """The gradient of the convolution behind it needs it now, too."""
    _, net = layers()
    loss = net(X).sum()
    with torch.no_grad():
        net.values["input"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation: the input of a batch norm"):
        torch.autograd.grad(loss, net.left.weight)


def test_a_copy_that_changed_before_it_was_saved_is_kept() -> None:
    class Copied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1, dtype=torch.bfloat16)

        def forward(self, x):
            y = self.bn(x).bfloat16()
            with torch.no_grad():
                y.mul_(2)
            return self.conv(y)

    check_same(*pair(Copied()))


def test_a_change_before_it_was_saved_is_kept() -> None:
    def change(y: Tensor) -> None:
        with torch.no_grad():
            y.mul_(2)

    keeping, recomputing = layers(change)
    check_same(keeping, recomputing)
    keeping, recomputing = layers(lambda y: y.mul_(2))
    check_same(keeping, recomputing)


def test_parameters_that_change_before_backward_do_not_matter_to_the_output() -> None:
    """As where they are kept: the convolution's gradient is that of the output that there was."""
    found = []
    for net in layers():
        loss = net(X).square().sum()
        with torch.no_grad():
            net.bn.running_mean.add_(1)
            net.bn.weight.data.mul_(3)
        found.append(torch.autograd.grad(loss, [net.left.weight, net.right.weight]))
    assert all(same_bits(*each) for each in zip(*found, strict=True))


def test_a_graph_whose_layer_is_through_already() -> None:
    """What saved the output may run its backward when that of the batch norm is over."""
    found = []
    for net in layers():
        net(X)
        y = net.values["output"]
        left, right = net.left(y).square().sum(), net.right(y).square().sum()
        batchnorm.ops.look_behind(left, right)
        left.backward()
        found.append(torch.autograd.grad(right, net.right.weight)[0])
    assert same_bits(*found)


def test_no_cycle_and_nothing_left_behind() -> None:
    _, recomputing = pair()
    inputs: list[weakref.ref[Tensor]] = []
    for module in recomputing.modules():
        if isinstance(module, batchnorm.BatchNorm2d):
            module.register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0])))
    gc.collect()
    gc.disable()
    try:
        y = recomputing(X)
        assert all(each() is not None for each in inputs)
        loss = y.sum()
        loss.backward()
        del y
        # The graph is still there, and holds nothing.
        assert all(each() is None for each in inputs)
        assert loss.grad_fn is not None
        inputs.clear()
        y = recomputing(X)
        del y
        assert inputs
        assert all(each() is None for each in inputs)
    finally:
        gc.enable()


class Landing(torch.autograd.Function):
    """x + 1, at a given address if it is free."""

    address = 0

    @staticmethod
    def forward(ctx, x):
        tries = [torch.empty_like(x)]
        while tries[-1].data_ptr() != Landing.address and len(tries) < 50:
            tries.append(torch.empty_like(x))
        return tries[-1].copy_(x + 1)

    @staticmethod
    def backward(ctx, dy):
        return dy


def test_memory_that_is_used_again_is_no_output() -> None:
    """What is saved three operators later may lie where the output was: it is another value."""

    class Chained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.out = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1)
            self.same = False

        def forward(self, x):
            y = self.bn(self.conv(x))
            Landing.address = y.data_ptr()
            y = -y
            y = Landing.apply(y)
            self.same = y.data_ptr() == Landing.address
            return self.out(y)

    # More than 32 MB: glibc takes each tensor from the system, and the system gives the same place again.
    keeping, recomputing = pair(Chained())
    check_same(keeping, recomputing, torch.randn(1, 1, 2100, 2100))
    if not recomputing.same:
        pytest.skip("this allocator did not use the memory again")


def test_views_that_are_no_part_of_the_output() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.factor = nn.Parameter(torch.randn(3, dtype=torch.complex64))

        def forward(self, x):
            y = self.bn(self.conv(x))
            z = torch.view_as_complex(y.unflatten(-1, (3, 2))) * self.factor
            return z.abs().sum() + (y.transpose(1, 2)[..., 1:] ** 2).sum() + (y.unsqueeze(0)[:, 1] ** 3).sum()

    check_same(*pair(Complex()))


@pytest.mark.parametrize("family", ["ghost", "renorm", "sync", "frozen", "virtual"])
def test_converted_afterwards(family: str) -> None:
    """Another class of layers, whose statistics no recipe knows."""
    options = {"ghost_size": 5} if family == "ghost" else {}
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    keeping = batchnorm.convert(batchnorm.fuse(net).model, family, **options).model
    recomputing = batchnorm.convert(batchnorm.fuse(net, memory="recompute").model, family, **options).model
    x = torch.randn(8, 3, 7, 7)
    grads = []
    for model in (keeping, recomputing):
        if family == "virtual":
            with batchnorm.reference_batch(model, graph=False):
                model(x)
        given = x.clone().requires_grad_()
        y = model(given)
        y.backward(torch.ones_like(y) * torch.arange(y.numel()).view_as(y).cos())
        grads.append([given.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
