"""What the tests of the statistics tools share: a slow and obvious implementation, and networks."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm


def norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def state(model: nn.Module) -> dict[str, Any]:
    """All that recalibrate may not leave changed after a failure."""
    return {
        "flags": [module.training for module in model.modules()],
        "buffers": [(name, id(value), value.clone()) for name, value in model.named_buffers()],
        "parameters": [(name, id(value), value.detach().clone()) for name, value in model.named_parameters()],
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        "grad": torch.is_grad_enabled(),
    }


def assert_same_state(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    for kind in ("flags", "hooks", "grad"):
        assert after[kind] == before[kind], kind
    for kind in ("buffers", "parameters"):
        assert len(after[kind]) == len(before[kind])
        for (name, place, value), (old_name, old_place, old) in zip(after[kind], before[kind], strict=True):
            assert (name, place) == (old_name, old_place)
            assert torch.equal(value, old) or (value.isnan() == old.isnan()).all(), name


def run_all(model: nn.Module, batches: Iterable[Any], call: Callable[[nn.Module, Any], Any]) -> None:
    with torch.no_grad():
        for batch in batches:
            call(model, batch)


def inputs_of(
    model: nn.Module, batches: Iterable[Any], call: Callable[[nn.Module, Any], Any]
) -> dict[str, Tensor]:
    """All values that reach each batch norm, as one float64 matrix (values, C)."""
    seen: dict[str, list[Tensor]] = {name: [] for name in norms(model)}

    def hook(name: str) -> Callable[..., None]:
        def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().double()
            seen[name].append(x.transpose(0, 1).flatten(1).T)

        return observe

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in norms(model).items()]
    run_all(model, batches, call)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items() if parts}


def in_training_mode(model: nn.Module, batches: Iterable[Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and unbiased variance of every layer's inputs, all batches of a float64 copy in training mode."""
    twin = twin_of(model).train()
    for module in twin.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    found = inputs_of(twin, [batch.double() for batch in batches], lambda net, batch: net(batch))
    return {name: (x.mean(0), x.var(0)) for name, x in found.items()}


def twin_of(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


class Branches(nn.Module):
    """Two branches that do not depend on each other, dropout, and a batch norm behind their sum."""

    def __init__(self, width: int = 5, ours: bool = False) -> None:
        super().__init__()
        norm2d = batchnorm.BatchNorm2d if ours else nn.BatchNorm2d
        self.stem = nn.Sequential(nn.Conv2d(2, width, 3), norm2d(width), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(width, width, 1), norm2d(width))
        self.right = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), norm2d(width))
        self.last = norm2d(width)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.last(torch.relu(self.left(x) + self.right(x)))
        return self.head(self.drop(x).mean((2, 3)))
