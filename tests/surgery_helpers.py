"""What the tests of `insert` share: reading a result, one training step, a residual network."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin

import batchnorm


def reasons(changes) -> dict[str, str]:
    return {skip.name: skip.reason for skip in changes.skipped}


def names(changes) -> list[str]:
    return [change.name for change in changes.changed]


def train_one_step(net: nn.Module, x: torch.Tensor) -> None:
    """Every parameter gets a finite gradient that is not zero throughout, and moves."""
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    y = net(x)
    (y * torch.randn_like(y)).sum().backward()
    optimizer.step()
    for name, value in net.named_parameters():
        assert torch.isfinite(value).all(), name
        assert not torch.equal(value, before[name]), name


class Block(nn.Module):
    """A residual block: one relu layer used twice, or the function."""

    def __init__(self, width: int, functional: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.short = nn.Conv2d(width, width, 1)
        self.relu = F.relu if functional else nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.conv2(self.relu(self.conv1(x)))
        y += self.short(x)
        return self.relu(y)


class Residual(nn.Module):
    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.Sequential(Block(4, functional), Block(4, functional))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = F.max_pool2d(F.dropout(self.stem(x), 0.0), 2).relu()
        return self.head(torch.flatten(F.adaptive_avg_pool2d(self.blocks(x), 1), 1))


def randomize(model: nn.Module) -> nn.Module:
    """Batch norms as after a training: statistics and parameters that are no identity, γ of either sign."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, LazyModuleMixin):
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.3, 3)
            if module.weight is not None:
                nn.init.normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias)
    return model


def notes(changes: batchnorm.Changes) -> dict[str, str]:
    return {change.name: change.note for change in changes.changed}


def steps(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of a training step, the buffers after it, and the output in evaluation."""
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    y = model.train()(x)
    (y * torch.randn_like(y)).sum().backward()
    grads = [p.grad for p in model.parameters()]
    assert all(grad is not None for grad in grads)
    found = [y, x.grad, *grads, *(buffer.double() for buffer in model.buffers())]
    with torch.no_grad():
        found.append(model.eval()(x))
    model.zero_grad()
    return [each.detach().clone() for each in found]


def check_fused(model: nn.Module, x: torch.Tensor, *, inplace: bool = False) -> batchnorm.Changes:
    """The fused model computes what the model computes, has its names and its parameters, and can be taken back."""
    model = randomize(model).double()
    x = x.double()
    plain = copy.deepcopy(model)
    keys, tree = list(model.state_dict()), [name for name, _ in model.named_modules(remove_duplicate=False)]
    changes = batchnorm.fuse(model, inplace=inplace)
    fused = changes.model
    assert (fused is model) == inplace
    assert list(fused.state_dict()) == keys
    assert [name for name, _ in fused.named_modules(remove_duplicate=False)] == tree
    assert isinstance(fused, type(plain))
    expected = steps(copy.deepcopy(plain), x)
    again = batchnorm.fuse(plain, memory="recompute").model
    for each in (fused, copy.deepcopy(fused), again, copy.deepcopy(again)):
        for actual, wanted in zip(steps(each, x), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-11)
        each.load_state_dict(plain.state_dict())
    before = [type(module) for module in plain.modules()]
    assert [type(module) for module in changes.revert().modules()] == before
    for actual, wanted in zip(steps(changes.revert(), x), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-11)
    changes.model.load_state_dict(plain.state_dict())
    return batchnorm.fuse(changes.model, inplace=inplace)


@contextmanager
def watched(net: nn.Module) -> Iterator[dict[str, tuple[StorageWeakRef, int]]]:
    """Whose output lives, and in how many bytes, without keeping one: filled while the network runs."""
    outputs: dict[str, tuple[StorageWeakRef, int]] = {}

    def hook(name: str) -> Callable:
        def note(module: nn.Module, args: object, y: torch.Tensor) -> None:
            outputs[name] = (StorageWeakRef(y.untyped_storage()), y.untyped_storage().nbytes())

        return note

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in net.named_modules()
        if not module._modules and not isinstance(module, nn.Identity)
    ]
    yield outputs
    for handle in handles:
        handle.remove()


def alive(net: nn.Module, x: torch.Tensor) -> tuple[set[str], int]:
    """The layers whose outputs live between forward and backward, and all the bytes of those outputs."""
    with watched(net) as outputs:
        y = net(x.detach().requires_grad_())
    found = {name: (storage, size) for name, (storage, size) in outputs.items() if not storage.expired()}
    sizes = {storage.cdata: size for storage, size in found.values()}
    del y
    return set(found), sum(sizes.values())
