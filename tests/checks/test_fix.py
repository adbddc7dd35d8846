"""`Findings.fix`: each mend on a broken model: the same in eval mode, no finding any more, and all of it taken back."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fix_helpers import (
    CASES,
    Blocks,
    Broken,
    Recomputed,
    average,
    batches,
    evaluated,
    few,
    half_frozen,
    mended,
    recomputed,
    snapshot,
)
from rule_helpers import only, plain, trained
from run_helpers import clock
from torch import Tensor, nn

import batchnorm
from batchnorm.checks._mends import MENDS
from batchnorm.checks._timing import OURS
from batchnorm.checks.rule import all_rules

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "api" / "checks.md").read_text("utf-8")


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
    assert any("BN112 comes first" in each.reason for each in changes.skipped)
    again = batchnorm.check(changes.model, select=codes, **made.given).fix()
    assert type(again.model.norm) is batchnorm.SyncBatchNorm
    assert batchnorm.check(again.model, select=codes, **made.given).findings == ()


def test_an_older_fix_is_not_reverted_before_a_newer_freeze() -> None:
    made = half_frozen(nn.BatchNorm2d)
    changes = batchnorm.check(made.model, select="BN010").fix(inplace=True)
    batchnorm.unfreeze(made.model, statistics=False, inplace=True)
    with pytest.raises(batchnorm.ModelError, match="revert"):
        changes.revert()


# Telling


def test_mendable_is_told(tmp_path: Path) -> None:
    model = trained(plain(nn.BatchNorm2d(4, momentum=0.9), nn.BatchNorm2d(4)))
    model[4].running_var[1] = float("inf")
    findings = batchnorm.check(model, select=["BN001", "BN004"])
    assert {each.code: each.mendable for each in findings} == {"BN001": False, "BN004": True}
    told = json.loads(findings.to_json())
    assert [each["mendable"] for each in told["findings"]] == [False, True]
    assert told["schema_version"] == 1
    assert "Fix (safe, by findings.fix(); recalibrate is left to you):" in findings.save(
        tmp_path / "check.html"
    ).read_text("utf-8")
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
