"""Broken models that `Findings.fix` can mend, and what a safe fix is held against."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rule_helpers import plain, trained
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm


@dataclass
class Broken:
    model: nn.Module
    given: dict[str, Any] = field(default_factory=dict)
    x: Tensor = field(default_factory=lambda: torch.randn(4, 4, 5, 5))
    rounding: float = 1e-5


Norm = Callable[..., nn.Module]


class Blocks(nn.Module):
    """Batch norms in a Sequential, in a module of its own, and under two names."""

    def __init__(self, norm: Norm, **options: Any) -> None:
        super().__init__()
        self.stem = plain(norm(4, **options))
        self.norm = norm(4, **options)
        self.again = nn.ModuleDict({"same": self.norm})

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.stem(x))


class Recomputed(nn.Module):
    def __init__(self, norm: Norm, reentrant: bool = False, times: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1)
        self.part = Blocks(norm)
        self.reentrant, self.times = reentrant, times

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(self.times):
            x = checkpoint(self.part, x, use_reentrant=self.reentrant) if self.training else self.part(x)
        return x


def batches(samples: int = 4) -> list[Tensor]:
    return [torch.randn(samples, 4, 5, 5) for _ in range(2)]


def half(norm: Norm) -> Broken:
    x = torch.randn(4, 4, 5, 5).bfloat16()
    return Broken(trained(Blocks(norm)).bfloat16(), x=x, rounding=0.1)


def keras(norm: Norm) -> Broken:
    return Broken(trained(Blocks(norm, momentum=0.99)))


def half_frozen(norm: Norm) -> Broken:
    return Broken(trained(Blocks(norm)).requires_grad_(False))


def average(norm: Norm) -> Broken:
    model = trained(Blocks(norm, momentum=None))
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(2000)
    return Broken(model)


def few(norm: Norm) -> Broken:
    return Broken(trained(Blocks(norm)), {"batches": batches(), "world_size": 4})


def recomputed(norm: Norm) -> Broken:
    return Broken(trained(Recomputed(norm)), {"batches": batches()})


CASES: dict[str, tuple[str, Callable[[Norm], Broken], Norm]] = {
    f"{code}-{name}": (code, build, norm)
    for code, build, norms in (
        ("BN003", half, "both"),
        ("BN004", keras, "both"),
        ("BN010", half_frozen, "both"),
        ("BN015", average, "both"),
        ("BN016", few, "both"),
        ("BN105", recomputed, "torch"),
    )
    for name, norm in (("torch", nn.BatchNorm2d), ("ours", batchnorm.BatchNorm2d))
    if norms in ("both", name)
}


def snapshot(model: nn.Module) -> list[Any]:
    """Everything that a change could touch, by identity."""
    return [
        (
            id(module),
            type(module),
            {name: value for name, value in vars(module).items() if not isinstance(value, dict)},
            {name: (id(p), p is not None and p.requires_grad) for name, p in module._parameters.items()},
            {name: id(buffer) for name, buffer in module._buffers.items()},
        )
        for module in model.modules()
    ]


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


def mended(made: Broken, code: str, *, inplace: bool) -> batchnorm.Changes:
    """Check, fix, and hold the result against the definition of a safe fix; then take it back, and do it again."""
    findings = batchnorm.check(made.model, select=code, **made.given)
    assert len(findings) > 0
    assert all(each.mendable for each in findings)
    before, y, keys = snapshot(made.model), evaluated(made.model, made.x), list(made.model.state_dict())
    names = {name for each in findings for name in (each.module, *each.also)}
    for _ in range(2):
        changes = findings.fix(inplace=inplace)
        assert (changes.model is made.model) == inplace
        assert {each.name for each in changes.changed} == names
        assert all(code in each.note for each in changes.changed)
        assert (changes.skipped, changes.notes) == ((), ())
        assert list(changes.model.state_dict()) == keys
        torch.testing.assert_close(
            evaluated(changes.model, made.x).float(), y.float(), rtol=made.rounding, atol=made.rounding
        )
        assert batchnorm.check(changes.model, select=code, **made.given).findings == ()
        told = any("make the optimizer anew" in each.note for each in changes.changed)
        if inplace:
            ids = [[id(p) for p in model.parameters()] for model in (changes.model, made.model)]
            old = [each for _, _, _, parameters, _ in before for each, _ in parameters.values()]
            assert told == bool(set(ids[0]) - set(old))
            assert changes.revert() is made.model
        else:
            copied = changes.revert()
            assert [type(each) for each in copied.modules()] == [each[1] for each in before]
            assert batchnorm.check(copied, select=code, **made.given).findings == findings.findings
        assert snapshot(made.model) == before
    return findings.fix(inplace=inplace)
