"""`check` itself: evidence, the choice of rules, findings as text, JSON and a page, fixes; it changes nothing."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from rule_helpers import found, only, plain, sick, trained
from stats_helpers import assert_same_state, state
from torch import nn

import batchnorm
from batchnorm.checks._collect import collect_state
from batchnorm.checks._words import code_for, parts
from batchnorm.checks.evidence import Evidence
from batchnorm.checks.rule import all_rules, rule_named

# Rules


def test_every_rule_has_a_page_and_is_named_as_its_file() -> None:
    rules = all_rules()
    assert set(rules) >= {f"BN{number:03}" for number in range(1, 20)}
    for code, rule in rules.items():
        assert (code, rule.code, rule.severity in ("error", "warning", "info")) == (rule.code, code, True)
        assert len(rule.page.split()) > 40, code
        assert "## What to do" in rule.page, code
        assert rule.title[0].islower() or rule.title.split()[0].isupper(), code
        assert rule.reference.startswith("https://"), code
    assert rule_named("bn001") is rules["BN001"]
    with pytest.raises(batchnorm.InputError, match="BN999"):
        rule_named("BN999")


def test_rules_read_evidence_and_no_model() -> None:
    """What they are given is data; nothing in it is a module."""
    evidence = collect_state(sick().state_dict())
    assert isinstance(evidence, Evidence)
    assert evidence.from_state
    with pytest.raises(AttributeError):
        evidence.layers = ()  # type: ignore[misc]


# Choice of rules


def test_select_and_ignore() -> None:
    model = sick()
    everything = {each.code for each in batchnorm.check(model)}
    assert {"BN001", "BN004", "BN007"} <= everything
    assert {each.code for each in batchnorm.check(model, select="BN001")} == {"BN001"}
    assert {each.code for each in batchnorm.check(model, select=["bn001", "BN004"])} == {"BN001", "BN004"}
    assert "BN001" not in {each.code for each in batchnorm.check(model, ignore="BN001")}
    few = batchnorm.check(model, select="BN0", ignore=["BN001", "BN002"])
    assert few.ran[0] == "BN003"
    assert not {"BN001", "BN002"} & set(few.ran)
    assert batchnorm.check(model, ignore="BN").ran == ()


@pytest.mark.parametrize("name", ["select", "ignore"])
@pytest.mark.parametrize("codes", ["BN9", ["BN001", "E501"], [""]])
def test_unknown_codes_are_refused(name: str, codes) -> None:
    with pytest.raises(batchnorm.InputError, match=name):
        batchnorm.check(sick(), **{name: codes})


def test_what_did_not_run_says_what_it_lacks() -> None:
    findings = batchnorm.check(sick())
    assert findings.not_run["BN014"] == "optimizer="
    assert findings.not_run["BN016"] == "batches=, world_size= of 2 or more"
    assert findings.not_run["BN017"] == "averaged="
    assert not set(findings.ran) & set(findings.not_run)
    of_state = batchnorm.check(sick().state_dict())
    assert "a model" in of_state.not_run["BN004"]
    assert {"BN001", "BN002", "BN003", "BN006", "BN007", "BN008"} == set(of_state.ran)


# Evidence


def test_same_words_for_several_layers_are_one_finding() -> None:
    model = plain(
        nn.BatchNorm2d(4, momentum=0.9), nn.BatchNorm2d(4, momentum=0.9), nn.BatchNorm2d(4, momentum=0.8)
    )
    first, second = batchnorm.check(model, select="BN004")
    assert (first.module, first.also, second.module, second.also) == ("1", ("4",), "7", ())
    assert str(first).startswith("1 (and 1 more): BN004 warning:")


def test_a_shared_layer_is_one_layer() -> None:
    norm = nn.BatchNorm2d(4, momentum=0.9)
    findings = batchnorm.check(plain(norm, norm))
    assert findings.layers == 1
    assert [each.also for each in findings if each.code == "BN004"] == [()]


def test_state_dict_and_model_say_the_same() -> None:
    model = sick()
    codes = ["BN001", "BN002", "BN003", "BN006", "BN007", "BN008"]
    of_state = batchnorm.check(model.state_dict(), select=codes)
    assert [str(each) for each in of_state] == [str(each) for each in batchnorm.check(model, select=codes)]
    assert of_state.layers == 3
    alone = nn.BatchNorm1d(2)
    alone.running_mean[0] = torch.inf
    assert only(alone.state_dict(), "BN001").module == ""


def test_wrapped_models_are_the_models_inside() -> None:
    model = sick()
    expected = [str(each) for each in batchnorm.check(model)]
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert [str(each) for each in batchnorm.check(wrapped)] == expected


class Winding(nn.Module):
    """A forward that torch.fx cannot follow, around a part that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x) if x.sum() > 0 else -self.part(x)


def test_a_forward_that_cannot_be_followed_is_noted() -> None:
    findings = batchnorm.check(Winding())
    assert len(findings.notes) == 1
    assert "could be followed" in findings.notes[0]
    assert "BN012" in {each.code for each in findings}  # of the part
    assert batchnorm.check(Winding(), select="BN001").notes == ()  # nobody asked for a graph


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.LazyBatchNorm1d()), nn.Module()])
def test_nothing_to_look_at_is_noted(model: nn.Module) -> None:
    findings = batchnorm.check(model)
    assert (len(findings), findings.layers) == (0, 0)
    lazy = isinstance(model, nn.Sequential)
    assert findings.notes[0] == f"there is no batch norm {'that knows its shape ' if lazy else ''}in it"


def test_layers_without_numbers_are_no_error() -> None:
    with torch.device("meta"):
        model = plain(nn.BatchNorm2d(4), batchnorm.BatchNorm2d(4))
    assert (
        batchnorm.check(
            model, select=["BN001", "BN002", "BN003", "BN005", "BN007", "BN008", "BN011"]
        ).findings
        == ()
    )


# Nothing is changed


def test_nothing_of_the_model_is_changed() -> None:
    model = nn.Sequential(*sick(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(4 * 25, 3))
    model[1].running_mean[1] = 0.0
    model.train()[4].eval()
    model[0].weight.requires_grad_(False)
    (model(torch.randn(4, 4, 5, 5)) * torch.randn(4, 3)).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    optimizer.step()
    average = batchnorm.averaged(model)
    before, of_average, kept = state(model), state(average), copy.deepcopy(optimizer.state_dict())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    wanted = [p.requires_grad for p in model.parameters()]
    numbers = (torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False))
    findings = batchnorm.check(
        model,
        batches=[torch.randn(4, 4, 5, 5, generator=torch.Generator().manual_seed(1)) for _ in range(2)],
        optimizer=optimizer,
        averaged=average,
        world_size=2,
    )
    assert findings.not_run == {}
    assert_same_state(model, before)
    assert_same_state(average, of_average)
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(gradients)
    assert all(
        torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters() if name in gradients
    )
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert random.getstate() == numbers[1]
    assert repr(np.random.get_state(legacy=False)) == repr(numbers[2])
    after = optimizer.state_dict()
    assert after["param_groups"] == kept["param_groups"]
    for number, values in kept["state"].items():
        assert torch.equal(after["state"][number]["momentum_buffer"], values["momentum_buffer"])


def test_findings_do_not_change_with_the_model() -> None:
    model = sick()
    findings = batchnorm.check(model)
    said = str(findings)
    model[1].running_mean.zero_()
    assert str(findings) == said


# Findings


def test_the_worst_comes_first_and_is_counted() -> None:
    findings = batchnorm.check(sick())
    order = [each.severity for each in findings]
    assert order == sorted(order, key=("error", "warning", "info").index)
    assert set(order) == {"error", "warning", "info"}
    assert [each.severity for each in findings.at_least("warning")] == [
        each for each in order if each != "info"
    ]
    assert findings.at_least("info") == tuple(findings) == findings.findings
    assert findings[0].code == "BN001"
    assert len(findings) == len(order)
    assert "1 error" in findings.summary
    assert "3 batch norms" in findings.summary
    assert repr(findings) == f"Findings({findings.summary})"
    assert batchnorm.check(trained(plain(nn.BatchNorm2d(4)))).summary.startswith("nothing found")


def test_as_text_each_has_why_and_fix() -> None:
    findings = batchnorm.check(sick())
    lines = str(findings).splitlines()
    for number, each in enumerate(findings):
        assert lines[3 * number : 3 * number + 2] == [str(each), f"  why: {each.cause}"]
        assert lines[3 * number + 2].startswith("  fix")
        assert lines[3 * number + 2].endswith(each.fix)
    rest = lines[3 * len(findings) :]
    assert rest[0] == findings.summary
    assert rest[-1].startswith("not looked at: 12 rules without batches=; ")
    assert "1 rule without averaged=" in rest[-1]
    told = str(batchnorm.check(nn.Linear(2, 2), select="BN001")).splitlines()
    assert told == ["nothing found: 0 batch norms looked at by 1 rule", "note: there is no batch norm in it"]


def test_json_and_page(tmp_path) -> None:
    findings = batchnorm.check(sick())
    told = json.loads(findings.save(tmp_path / "check.json").read_text("utf-8"))
    assert told == json.loads(findings.to_json())
    assert (told["kind"], told["schema_version"], told["layers"]) == ("check", 1, 3)
    assert [each["code"] for each in told["findings"]] == [each.code for each in findings]
    assert all(
        each["title"] and each["message"] and each["cause"] and each["fix"] for each in told["findings"]
    )
    assert told["not_run"] == findings.not_run
    page = findings.save(tmp_path / "check.html").read_text("utf-8")
    for each in findings:
        assert each.code in page
    assert "Errors: results are wrong" in page
    assert "Not looked at" in page
    healthy = (
        batchnorm.check(trained(plain(nn.BatchNorm2d(4)))).save(tmp_path / "healthy.html").read_text("utf-8")
    )
    assert "No rule has found anything" in healthy
    with pytest.raises(batchnorm.InputError, match="output path"):
        findings.save(tmp_path / "check.txt")


# Fixes


def test_fix_mends_half_precision_and_momentum() -> None:
    model = sick().half()
    findings = batchnorm.check(model, select=["BN003", "BN004"])
    x = torch.randn(2, 4, 5, 5).half()
    changes = findings.fix()
    mended = changes.model
    assert mended is not model
    assert model[1].running_mean.dtype == torch.float16
    assert batchnorm.check(mended, select=["BN003", "BN004"]).findings == ()
    assert [mended[place].running_var.dtype for place in (1, 4, 7)] == [torch.float32] * 3
    assert [round(mended[place].momentum, 6) for place in (1, 4, 7)] == [0.1, 0.1, 0.1]
    assert {change.name for change in changes.changed} == {"1", "4", "7"}
    model[1].running_mean[1] = mended[1].running_mean[1] = 0.0
    for mode in (False, True):  # what they compute: PyTorch's layers want weight and bias in float32, too
        y = copy.deepcopy(mended).train(mode)(x)
        assert y.dtype == torch.float16
        torch.testing.assert_close(y, copy.deepcopy(model).train(mode)(x), rtol=2e-2, atol=2e-2)
    same = findings.fix(inplace=True)
    assert same.model is model
    assert model[7].momentum == pytest.approx(0.1)
    same.revert()
    assert (model[7].momentum, model[7].running_var.dtype, model[7].weight.dtype) == (
        0.9,
        *[torch.float16] * 2,
    )


def test_parameters_of_this_packages_layers_stay_for_the_optimizer() -> None:
    model = trained(plain(batchnorm.BatchNorm2d(4))).bfloat16()
    parameters = [id(p) for p in model.parameters()]
    mended = batchnorm.check(model, select="BN003").fix(inplace=True).model
    assert [id(p) for p in mended.parameters()] == parameters
    assert mended(torch.randn(2, 4, 5, 5).bfloat16()).dtype == torch.bfloat16


def test_fix_leaves_the_rest_with_its_reason() -> None:
    model = sick()
    changes = batchnorm.check(model, select=["BN001", "BN004"]).fix()
    assert {change.name for change in changes.changed} == {"4", "7"}
    assert [skip.name for skip in changes.skipped] == ["1"]
    assert "batchnorm.recalibrate" in changes.skipped[0].reason
    model[4].momentum = 1.0  # 1 − 1 would freeze the statistics
    assert batchnorm.check(model, select="BN004").fix().model[4].momentum == 1.0


def test_fix_of_a_state_dict_is_refused() -> None:
    with pytest.raises(batchnorm.ModelError, match="state dict"):
        batchnorm.check(sick().state_dict()).fix()


# Words


def test_parts_of_a_model() -> None:
    every = ["a.b", "a.c", "d.e", "d.f"]
    assert parts(["a.b", "a.c", "d.e"], every) == ("a", "d.e")
    assert parts(every, every) == ("",)
    assert parts(["a.b"], ["a.b", "a.bc"]) == ("a.b",)
    assert [code_for(part) for part in ("", "layer1.bn", "0.norm")] == [
        "model",
        "model.layer1.bn",
        'model.get_submodule("0.norm")',
    ]
    assert found(nn.BatchNorm1d(3), "BN009") == ()
