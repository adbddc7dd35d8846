"""`Findings.fix`: what it leaves, and why; tensors that are shared or held; models that have changed since."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fix_helpers import (
    CASES,
    Blocks,
    Broken,
    Norm,
    Recomputed,
    average,
    batches,
    evaluated,
    few,
    half,
    half_frozen,
    keras,
    mended,
    recomputed,
    snapshot,
)
from processes import alone
from rule_helpers import plain, trained
from torch import Tensor, nn

import batchnorm

# What is left


class Own(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


@pytest.mark.parametrize(("build", "code"), [(few, "BN016"), (recomputed, "BN105")])
def test_a_class_of_its_own_is_not_converted(build: Callable[[Norm], Broken], code: str) -> None:
    made = build(Own)
    findings = batchnorm.check(made.model, select=code, **made.given)
    changes = findings.fix()
    assert (len(changes.changed), len(changes.skipped)) == (0, 2)
    assert (
        "Own is a class of its own, which may do more than normalize. batchnorm.convert"
        in changes.skipped[0].reason
    )
    assert not any(each.mendable for each in findings)


@pytest.mark.parametrize("code", ["BN003", "BN004", "BN010", "BN015"])
def test_a_class_of_its_own_is_mended_otherwise(code: str) -> None:
    build = {"BN003": half, "BN004": keras, "BN010": half_frozen, "BN015": average}[code]
    changes = mended(build(Own), code, inplace=True)
    assert isinstance(changes.model.norm, Own)


def test_few_samples_together_are_left() -> None:
    model = plain(nn.BatchNorm2d(4))
    findings = batchnorm.check(model, select="BN016", batches=batches(2), world_size=4)
    assert (findings[0].mendable, findings[0].evidence["to"]) == (False, "renorm")
    (skipped,) = findings.fix().skipped
    assert (
        'all processes together have few samples, too. batchnorm.convert(model, "renorm")' in skipped.reason
    )


@pytest.mark.parametrize("recompute", [True, False])
def test_several_calls_a_forward_are_left(recompute: bool) -> None:
    model = Recomputed(nn.BatchNorm2d, times=2)
    if not recompute:
        model.forward = lambda x: model.part(model.part(x))  # type: ignore[method-assign]
    findings = batchnorm.check(model, select="BN105", batches=batches())
    assert findings[0].evidence["cause"] == ("recomputation" if recompute else "calls")
    changes = findings.fix(inplace=True)
    assert (changes.changed, len(changes.skipped)) == ((), 2)
    assert "the model calls it several times" in changes.skipped[0].reason


def test_synchronized_layers_stay_synchronized() -> None:
    made = Broken(trained(Recomputed(nn.SyncBatchNorm)), {"batches": batches()})
    model = mended(made, "BN105", inplace=True).model
    assert type(model.part.norm) is batchnorm.SyncBatchNorm


@pytest.mark.parametrize("momentum", [0.5, 1.0, 1.5])
def test_a_momentum_that_has_no_other(momentum: float) -> None:
    model = nn.BatchNorm2d(4, momentum=momentum)
    findings = batchnorm.check(model, select="BN004")
    assert not findings[0].mendable
    assert (len(findings.fix(inplace=True).skipped), model.momentum) == (1, momentum)


def test_compiled_layers_become_ones_that_compile() -> None:
    model = trained(plain(nn.BatchNorm2d(4, momentum=None)))
    x = torch.randn(4, 4, 5, 5)
    y = evaluated(model, x)
    findings = batchnorm.check(torch.compile(model, backend="eager"), select="BN015")
    changes = findings.fix(inplace=True)
    assert changes.model is model
    assert (type(model[1]), model[1].momentum) == (batchnorm.BatchNorm2d, None)
    torch.testing.assert_close(evaluated(model, x), y)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert batchnorm.check(compiled, select="BN015").findings == ()
    compiled(x)
    assert changes.revert()[1].__class__ is nn.BatchNorm2d


# Tensors that are shared


def test_tied_weights_stay_tied() -> None:
    made = half(nn.BatchNorm2d)
    model: Any = made.model
    model.norm.weight = model.stem[1].weight
    for name in ("running_mean", "running_var"):
        model.norm._buffers[name] = model.stem[1]._buffers[name]
    mended(made, "BN003", inplace=True)
    assert model.norm.weight is model.stem[1].weight
    assert model.norm.running_mean is model.stem[1].running_mean
    assert (model.norm.weight.dtype, model.norm.bias is model.stem[1].bias) == (torch.float32, False)


def test_a_tie_to_what_stays_narrow_is_not_torn() -> None:
    model: Any = trained(Blocks(nn.BatchNorm2d)).bfloat16()
    model.norm.weight = model.stem[1].weight
    model.other = nn.LayerNorm(4).bfloat16()
    model.other.weight = model.norm.weight
    before = snapshot(model)
    findings = batchnorm.check(model, select="BN003")
    changes = findings.fix(inplace=True)
    assert (changes.changed, len(changes.skipped)) == ((), 2)
    assert all("its weight is also other's weight" in each.reason for each in changes.skipped)
    assert not any(each.mendable for each in findings)
    assert snapshot(model) == before
    model.other.weight = nn.Parameter(torch.ones(4))
    assert len(batchnorm.check(model, select="BN003").fix().changed) == 2


def test_a_layer_that_stays_keeps_what_it_shares() -> None:
    """The first layer's bias is another's, so its weight may not be new either, nor the one that shares it."""
    model: Any = trained(Blocks(nn.BatchNorm2d)).bfloat16()
    model.norm.weight = model.stem[1].weight
    model.other = nn.LayerNorm(4).bfloat16()
    model.other.bias = model.stem[1].bias
    reasons = {each.name: each.reason for each in batchnorm.check(model, select="BN003").fix().skipped}
    assert "its bias is also other's bias" in reasons["stem.1"]
    assert "its weight is also stem.1's weight" in reasons["norm"]


def test_under_distributed_data_parallel(tmp_path: Path) -> None:
    with alone(tmp_path):
        model = trained(Blocks(nn.BatchNorm2d)).bfloat16()
        model.norm.momentum = 0.9
        wrapped = nn.parallel.DistributedDataParallel(model)
        findings = batchnorm.check(wrapped, select=["BN003", "BN004"])
        assert [each.module for each in findings if each.mendable][-1:] == ["norm"]
        parameters = [id(p) for p in model.parameters()]
        changes = findings.fix(inplace=True)
        assert changes.model is model
        assert [id(p) for p in wrapped.module.parameters()] == parameters
        assert (round(model.norm.momentum, 6), model.norm.running_mean.dtype) == (0.1, torch.bfloat16)
        assert any("DistributedDataParallel holds its weight" in each.reason for each in changes.skipped)
        assert findings.fix().model.norm.weight.dtype == torch.float32  # a copy is not wrapped
        made = few(nn.BatchNorm2d)
        wrapped = nn.parallel.DistributedDataParallel(made.model)
        batchnorm.check(wrapped, select="BN016", **made.given).fix(inplace=True)
        wrapped(made.x).sum().backward()
        assert type(made.model.norm) is batchnorm.SyncBatchNorm


# Choosing, and what has changed since


def test_choosing() -> None:
    model = trained(plain(nn.BatchNorm2d(4, momentum=0.9))).bfloat16()
    model[1].running_mean[0] = float("nan")
    findings = batchnorm.check(model, select=["BN001", "BN003", "BN004"])
    for chosen in (findings.fix("BN004"), findings.fix(ignore=["BN001", "BN003"]), findings.fix(["bn004"])):
        assert [each.note for each in chosen.changed] == [
            "BN004: momentum is 0.1 now; left to you: batchnorm.recalibrate(model, loader)"
        ]
        assert (chosen.skipped, chosen.notes) == ((), ())
    assert findings.fix("BN001").changed == ()
    assert "BN001: batchnorm.recalibrate" in findings.fix("BN001").skipped[0].reason
    assert findings.fix("BN101").changed == ()
    both = findings.fix("BN00")
    assert "BN003" in both.changed[0].note
    assert [each.name for each in both.skipped if each.reason.startswith("not mended by itself. BN001")] == [
        "1"
    ]
    assert "fix: 1 changed, 1 skipped" in str(both)
    with pytest.raises(batchnorm.InputError, match="BN9"):
        findings.fix("BN9")


def test_a_model_that_has_changed_since() -> None:
    model: Any = trained(plain(*(nn.BatchNorm2d(4, momentum=0.9) for _ in range(4))))
    findings = batchnorm.check(model, select="BN004")
    del model[10]  # now the ReLU behind it is 10, and 11 is gone
    model[1] = nn.BatchNorm2d(4, momentum=0.9)
    batchnorm.freeze(model[4], inplace=True)
    model[7].momentum = 0.8
    changes = findings.fix(inplace=True)
    assert changes.changed == ()
    reasons = {each.name: each.reason for each in changes.skipped}
    assert "another layer stands there since the check: check again" in reasons["1"]
    assert "it has become a FrozenBatchNorm2d since the check: check again" in reasons["4"]
    assert "its momentum is another one by now" in reasons["7"]
    assert "another layer stands there" in reasons["10"]
    del model[1:]
    changes = findings.fix()
    assert changes.changed == ()
    assert any(each.name == "10" and "it is gone since the check" in each.reason for each in changes.skipped)


@pytest.mark.parametrize("case", ["BN003-torch", "BN004-torch", "BN010-torch", "BN015-torch", "BN016-torch"])
def test_twice_in_place_is_once(case: str) -> None:
    code, build, norm = CASES[case]
    made = build(norm)
    findings = batchnorm.check(made.model, select=code, **made.given)
    findings.fix(inplace=True)
    after = snapshot(made.model)
    again = findings.fix(inplace=True)
    assert (again.changed, len(again.skipped)) == ((), 2)
    assert re.search("by now|since the check", again.skipped[0].reason)
    assert snapshot(made.model) == after


def test_a_frozen_weight_that_is_trained_by_now() -> None:
    made = half_frozen(nn.BatchNorm2d)
    findings = batchnorm.check(made.model, select="BN010")
    made.model.requires_grad_(True)
    assert "trained by now" in findings.fix().skipped[0].reason


def test_a_layer_that_is_gone_is_told_without_a_place() -> None:
    model = trained(plain(nn.BatchNorm2d(4, momentum=0.9)))
    findings = batchnorm.check(model, select="BN004")
    del model[1:]
    changes = findings.fix()
    assert [(each.name, each.reason) for each in changes.skipped] == [
        ("1", "not mended by itself. BN004: it is gone since the check: check again")
    ]
    assert str(changes).startswith("fix: 0 changed, 1 skipped")


def test_a_finding_of_the_whole_model_is_skipped() -> None:
    class Mixed(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) - x.mean(0)

    model = nn.Sequential(Mixed(4)).eval()
    findings = batchnorm.check(model, batches=[torch.randn(8, 4, 5, 5)] * 2, select="BN102")
    assert [each.module for each in findings] == [""]
    changes = findings.fix()
    assert [each.name for each in changes.skipped] == [""]
    assert "(the model itself): not mended by itself. BN102: " in str(changes)


def test_what_is_undone_says_so() -> None:
    made = half_frozen(nn.BatchNorm2d)
    changes = batchnorm.check(made.model, select="BN010").fix()
    assert "BN010: statistics frozen, as weight and bias are" in str(changes)
    assert "reverted" not in str(changes)
    changes.revert()
    assert str(changes).startswith("fix (reverted): ")
    assert repr(changes).startswith("Changes(fix (reverted): ")
