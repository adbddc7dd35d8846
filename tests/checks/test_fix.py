"""`Findings.fix`: each mend on a broken model: the same in eval mode, no finding any more, and all of it taken back."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import alone
from rule_helpers import only, plain, trained
from run_helpers import clock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.checks._mends import MENDS
from batchnorm.checks._timing import OURS
from batchnorm.checks.rule import all_rules

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "api" / "checks.md").read_text("utf-8")


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


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("case", sorted(CASES))
def test_a_safe_fix(case: str, inplace: bool) -> None:
    code, build, norm = CASES[case]
    changes = mended(build(norm), code, inplace=inplace)
    shared = [each.also for each in changes.changed if each.also]
    assert [names[0].endswith("again.same") for names in shared] == [True]


def test_there_is_a_case_for_each() -> None:
    assert set(MENDS) == {code for code, _, _ in CASES.values()} | {
        "BN109",
        "BN112",
    }  # which are made up below


def test_training_goes_on_as_the_finding_wants() -> None:
    """What the fix is for, in training mode."""
    made = recomputed(nn.BatchNorm2d)
    model = mended(made, "BN105", inplace=False).model.train()
    assert [type(model.part.norm), type(model.part.stem[1])] == [batchnorm.BatchNorm2d] * 2
    count = int(model.part.norm.num_batches_tracked)
    model(made.x).sum().backward()
    assert int(model.part.norm.num_batches_tracked) == count + 1
    model = mended(half_frozen(nn.BatchNorm2d), "BN010", inplace=False).model.train()
    held = model.norm.running_mean.clone()
    model(made.x)
    assert torch.equal(model.norm.running_mean, held)
    model = mended(few(nn.BatchNorm2d), "BN016", inplace=False).model
    assert isinstance(model.norm, batchnorm.SyncBatchNorm)
    assert batchnorm.convert(model, "torch").skipped == ()  # and back: it remembers its axes
    assert mended(average(nn.BatchNorm2d), "BN015", inplace=False).model.norm.momentum == 0.1


def test_the_layer_itself() -> None:
    model = nn.BatchNorm2d(4, momentum=0.9)
    changes = mended(Broken(model), "BN004", inplace=True)
    assert (changes.changed[0].name, round(model.momentum, 6)) == ("", 0.1)


# Machines


def test_the_faster_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fair, fast = [9.0] + [3.0] * 5, [9.0] + [2.5] * 5, [9.0] + [1.0] * 5
    others = {(False, False): slow, (False, True): fair, (True, True): fair}
    given = {"batches": [torch.randn(4, 4, 12, 12)]}
    model = nn.Sequential(trained(nn.BatchNorm2d(4)))
    clock(monkeypatch, others | {(True, False): fast})
    findings = batchnorm.check(model, select="BN109", **given)
    assert (findings[0].mendable, findings[0].evidence["faster"]) == (True, OURS)
    changes = findings.fix()
    assert type(changes.model[0]) is batchnorm.BatchNorm2d
    torch.testing.assert_close(
        evaluated(changes.model, given["batches"][0]), evaluated(model, given["batches"][0])
    )
    clock(monkeypatch, {(True, False): fast, (True, True): fair})
    assert batchnorm.check(changes.model, select="BN109", **given).findings == ()
    clock(monkeypatch, others | {(True, False): fair, (False, True): fast})
    findings = batchnorm.check(model, select="BN109", **given)
    assert not findings[0].mendable
    assert "layout is one of the whole model" in findings.fix().skipped[0].reason


def wrong(monkeypatch: pytest.MonkeyPatch, *classes: type[nn.Module], reference: bool = False) -> None:
    """Classes whose training forward is off, the reference backend's too on request."""
    for cls in classes:
        right = cls.forward

        def forward(self: nn.Module, x: Tensor, *args: Any, right: Any = right, **kwargs: Any) -> Tensor:
            y = right(self, x, *args, **kwargs)
            exact = getattr(self, "backend", None) == "reference" and (
                not reference or y.dtype == torch.float64
            )
            return y if exact or not self.training else y * 1.01

        monkeypatch.setattr(cls, "forward", forward)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, batchnorm.BatchNorm2d])
def test_a_device_that_computes_wrongly(monkeypatch: pytest.MonkeyPatch, norm: Any, inplace: bool) -> None:
    made = Broken(trained(Blocks(norm)), {"batches": batches()})
    wrong(monkeypatch, norm)
    changes = mended(made, "BN112", inplace=inplace)
    assert type(changes.model.norm) is batchnorm.BatchNorm2d
    assert changes.model.norm.backend == ("reference" if norm is batchnorm.BatchNorm2d else None)


@pytest.mark.parametrize("reference", [True, False])
def test_a_device_on_which_this_packages_layer_is_wrong_too(
    monkeypatch: pytest.MonkeyPatch, reference: bool
) -> None:
    made = Broken(trained(Blocks(nn.BatchNorm2d)), {"batches": batches()})
    wrong(monkeypatch, nn.BatchNorm2d, batchnorm.BatchNorm2d, reference=reference)
    if not reference:
        model = mended(made, "BN112", inplace=False).model
        assert (type(model.norm), model.norm.backend) == (batchnorm.BatchNorm2d, "reference")
        return
    finding = only(made.model, "BN112", **made.given)
    assert (finding.mendable, finding.evidence["instead"]) == (False, "")
    assert finding.fix == "update PyTorch and the driver; this package's layers are wrong here, too"
    changes = batchnorm.check(made.model, select="BN112", **made.given).fix()
    assert len(changes.skipped) == 2
    assert "update PyTorch" in changes.skipped[0].reason


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


# Several at once


def test_all_that_is_to_become_of_a_layer_is_one_change() -> None:
    model = trained(Recomputed(nn.BatchNorm2d)).bfloat16()
    model.part.norm.momentum = model.part.stem[1].momentum = 0.9
    for norm in (model.part.norm, model.part.stem[1]):
        norm.requires_grad_(False)
    before = snapshot(model)
    given = {"batches": [each.bfloat16() for each in batches()], "world_size": 4}
    codes = ["BN003", "BN004", "BN010", "BN016", "BN105"]
    findings = batchnorm.check(model, select=codes, **given)
    assert {each.code for each in findings if each.mendable} == set(codes)
    x = given["batches"][0]
    y = evaluated(model, x)
    parameters = [id(p) for p in model.parameters()]
    changes = findings.fix(inplace=True)
    assert len(changes.changed) == 2
    assert [id(p) for p in model.parameters()] == parameters  # ours takes weights in half precision
    norm = model.part.norm
    assert isinstance(norm, batchnorm.SyncBatchNorm)  # which counts once, too
    assert (norm.training, round(norm.momentum, 6), norm.running_mean.dtype) == (False, 0.1, torch.float32)
    torch.testing.assert_close(evaluated(model, x).float(), y.float(), rtol=0.1, atol=0.1)
    assert batchnorm.check(model, select=codes, **given).findings == ()
    assert type(batchnorm.unfreeze(model, affine=False).model.part.norm) is batchnorm.SyncBatchNorm
    changes.revert()
    assert snapshot(model) == before


def test_wrong_layers_are_not_synchronized_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test is of the plain layer."""
    made = few(nn.BatchNorm2d)
    wrong(monkeypatch, nn.BatchNorm2d)
    codes = ["BN016", "BN112"]
    changes = batchnorm.check(made.model, select=codes, **made.given).fix()
    assert type(changes.model.norm) is batchnorm.BatchNorm2d
    assert any("BN112 comes first" in note for note in changes.notes)
    again = batchnorm.check(changes.model, select=codes, **made.given).fix()
    assert type(again.model.norm) is batchnorm.SyncBatchNorm
    assert batchnorm.check(again.model, select=codes, **made.given).findings == ()


def test_an_older_fix_is_not_reverted_before_a_newer_freeze() -> None:
    made = half_frozen(nn.BatchNorm2d)
    changes = batchnorm.check(made.model, select="BN010").fix(inplace=True)
    batchnorm.unfreeze(made.model, statistics=False, inplace=True)
    with pytest.raises(batchnorm.ModelError, match="revert"):
        changes.revert()


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
        assert any("DistributedDataParallel holds its weight and bias" in note for note in changes.notes)
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
        assert [each.note for each in chosen.changed] == ["BN004: momentum is 0.1 now"]
        assert (chosen.skipped, chosen.notes) == ((), ())
    assert findings.fix("BN001").changed == ()
    assert "BN001: batchnorm.recalibrate" in findings.fix("BN001").skipped[0].reason
    assert findings.fix("BN101").changed == ()
    both = findings.fix("BN00")
    assert "BN003" in both.changed[0].note
    assert any(note.startswith("1: not mended by itself. BN001") for note in both.notes)
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
    assert any(note.startswith("10: ") and "it is gone since the check" in note for note in changes.notes)


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
    assert changes.notes[0] == "1: not mended by itself. BN004: it is gone since the check: check again"
    assert str(changes).startswith("fix: 0 changed, 0 skipped")


# Telling


def test_mendable_is_told(tmp_path: Path) -> None:
    model = trained(plain(nn.BatchNorm2d(4, momentum=0.9), nn.BatchNorm2d(4)))
    model[4].running_var[1] = float("inf")
    findings = batchnorm.check(model, select=["BN001", "BN004"])
    assert {each.code: each.mendable for each in findings} == {"BN001": False, "BN004": True}
    told = json.loads(findings.to_json())
    assert [each["mendable"] for each in told["findings"]] == [False, True]
    assert told["schema_version"] == 1
    assert "Fix (safe, by findings.fix()):" in findings.save(tmp_path / "check.html").read_text("utf-8")
    state = batchnorm.check(model.state_dict(), select="BN001")
    assert not any(each.mendable for each in state)


def test_the_page_has_a_row_for_every_rule() -> None:
    rows = dict(re.findall(r"^\| (BN\d{3}) \| (.*?) \|", PAGE, flags=re.MULTILINE))
    assert list(rows) == list(all_rules())
    assert {code for code, done in rows.items() if done != "nothing"} == set(MENDS)


def test_the_rules_pages_say_what_is_mended() -> None:
    assert {code for code, rule in all_rules().items() if "findings.fix()`" in rule.page} == {*MENDS, "BN012"}
    said = re.findall(r"BN\d{3}", (batchnorm.Findings.fix.__doc__ or "").partition("Args:")[0])
    assert list(dict.fromkeys(sorted(said))) == sorted(MENDS)
