"""What the other tools make of networks with domain and conditional layers."""

import copy

import pytest
import torch
from surgery_helpers import names, randomize, reasons
from torch import nn

import batchnorm

X = torch.randn(8, 3, 6, 6)
LABELS = torch.arange(8) % 3


def net() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4, eps=1e-3, momentum=0.2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 5),
        batchnorm.BatchNorm1d(5, activation="relu", nonfinite="skip"),
        nn.Linear(5, 2),
    )
    return randomize(model)


def told(to: str):
    """How a converted network is called: the block around it."""
    return batchnorm.domain("b") if to == "domain" else batchnorm.condition(LABELS)


@pytest.fixture(params=["domain", "conditional"])
def converted(request) -> tuple[nn.Module, str]:
    options = {"domains": ("a", "b"), "default": "a"} if request.param == "domain" else {"num_classes": 3}
    return batchnorm.convert(net(), request.param, **options).model, request.param


def test_tools_that_leave_them_alone(converted) -> None:
    model, kind = converted
    before = copy.deepcopy(model.state_dict())
    layers = {"1.a", "1.b", "5.a", "5.b"} if kind == "domain" else {"1", "5"}
    reason = "keep one first" if kind == "domain" else "which may do more than normalize"
    with told(kind):
        expected = model.eval()(X)
        for tool in (batchnorm.fold, batchnorm.remove, batchnorm.fuse, batchnorm.absorb_bias):
            changes = tool(model)
            torch.testing.assert_close(changes.model.eval()(X), expected, msg=tool.__name__)
            assert {*names(changes)} <= {"4", "6"}
            if tool is not batchnorm.absorb_bias:
                assert set(reasons(changes)) == layers
                assert all(reason in each for each in reasons(changes).values())
        folded = batchnorm.fold(model, X)
        assert not folded.changed
    inserted = batchnorm.insert(model)
    assert "already follows it" in reasons(inserted)["0"]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_freeze(converted) -> None:
    model, kind = converted
    frozen = batchnorm.freeze(model).model.train()
    state = copy.deepcopy(frozen.state_dict())
    trained = [name for name, parameter in frozen.named_parameters() if parameter.requires_grad]
    assert trained == ["0.weight", "4.weight", "4.bias", "6.weight", "6.bias"]
    with told(kind):
        torch.testing.assert_close(frozen(X), model.eval()(X))
    torch.testing.assert_close(frozen.state_dict(), state, rtol=0, atol=0)
    free = batchnorm.unfreeze(frozen).model
    assert all(parameter.requires_grad for parameter in free.parameters())
    torch.testing.assert_close(copy.deepcopy(frozen).state_dict(), state)
    assert "frozen" in reasons(batchnorm.convert(frozen, "torch", domain="a", condition=0))["1"]


def test_recalibrate_sets_the_domain_of_the_block(converted) -> None:
    model, kind = converted
    before = copy.deepcopy(model.state_dict())
    with told(kind):
        found = batchnorm.recalibrate(model.eval(), [X, X + 1])
    seen = torch.cat([model[0](X), model[0](X + 1)])
    reached = model[1].b if kind == "domain" else model[1]
    torch.testing.assert_close(reached.running_mean, seen.mean((0, 2, 3)))
    torch.testing.assert_close(reached.running_var, seen.var((0, 2, 3)))
    if kind == "domain":
        assert {skip.name: skip.reason for skip in found.skipped} == dict.fromkeys(
            ("1.a", "5.a"), "no batch reached it"
        )
        for name in ("1.a.running_mean", "5.a.running_var", "1.a.num_batches_tracked"):
            assert torch.equal(model.state_dict()[name], before[name])


def test_updates_that_are_held_and_forwards_that_are_run_again(converted) -> None:
    model, kind = converted
    whole, again = copy.deepcopy(model)[1], copy.deepcopy(model)[1]
    x, labels = torch.randn(16, 4, 3, 3), torch.arange(16) % 3
    part = model[1].b if kind == "domain" else model[1]
    with batchnorm.accumulate(model[1], 4):
        for some, classes in zip(x.split(4), labels.split(4), strict=True):
            with batchnorm.domain("b"), batchnorm.condition(classes):
                model[1](some)
    with batchnorm.domain("b"), batchnorm.condition(labels):
        whole(x)
    torch.testing.assert_close(model[1].state_dict(), whole.state_dict())
    assert part.num_batches_tracked == whole.state_dict()["b." * (kind == "domain") + "num_batches_tracked"]

    def told(x):
        with batchnorm.domain("b"), batchnorm.condition(labels):
            return again(x)

    y = torch.utils.checkpoint.checkpoint(told, x.requires_grad_(), use_reentrant=False)
    y.backward(torch.randn_like(y))
    torch.testing.assert_close(again.state_dict(), whole.state_dict())


def test_recalibrate_finds_the_mask_behind_the_condition() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = batchnorm.ConditionalBatchNorm(3, 4)

        def forward(self, x, mask):
            return self.norm(x, torch.zeros(len(x), dtype=torch.long), torch.zeros_like(x), mask)

    model, x, mask = Masked(), torch.randn(20, 3, 5), torch.rand(20, 5) > 0.5
    batchnorm.recalibrate(model, [(x, mask)], forward=lambda model, batch: model(*batch))
    torch.testing.assert_close(model.norm.running_mean, x.transpose(1, 2)[mask].mean(0))


def test_adapt_average_and_groups(converted) -> None:
    model, kind = converted
    before = copy.deepcopy(model.eval().state_dict())
    with told(kind), batchnorm.adapt(model, method="tent", lr=0.1) as adapted:
        with pytest.warns(UserWarning, match="8 samples"):
            first = adapted(X)
        assert not torch.equal(adapted(X), first)
        moved = model[1].b.weight if kind == "domain" else model[1].class_weight
        assert not torch.equal(moved, before["1.b.weight" if kind == "domain" else "1.class_weight"])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    average = batchnorm.averaged(model)
    average.update_parameters(model)
    torch.testing.assert_close(average.module.state_dict(), before)
    decaying, others = batchnorm.parameter_groups(model, 0.1)
    assert [len(decaying["params"]), len(others["params"])] == [3, 2 + 4]
    merged = batchnorm.merge_statistics([before, before], [1, 1])
    assert merged.keys() == before.keys()
