"""The corpus behind docs/checking.md: what is counted, and that the page's tables are the results' own."""

import contextlib
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmark_scripts import load
from torch import nn

import batchnorm
from batchnorm.checks.rule import all_rules


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("check_corpus")


# Each takes a second at most, and needs no further package.
QUICK = [
    "missing_value",
    "extrapolated_state",
    "bfloat16_unet",
    "keras_momentum",
    "eps_above_the_data",
    "parameters_alone",
    "trained_in_eval_mode",
    "pascals",
    "dropout_at_test_time",
    "adapters",
    "transductive",
    "dead_bias_unet",
    "dropout_before",
    "eight_processes",
    "swa_without_buffers",
    "before_a_padded_convolution",
    "slow_momentum",
    "soup",
    "own_train_method",
    "plain_list",
    "two_rows",
    "one_picture_left",
    "checkpointed",
    "sorted_digits",
    "sorted_table",
    "sensor_off",
    "two_domains",
    "accumulated_by_four",
    "wrong_gradient",
    "contrastive_table",
    "two_recorders",
    "faded",
    "pruned_everywhere",
    "stuck_at_the_lowest",
]


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.filterwarnings("ignore")  # PyTorch's, of what is wrong with these models
def test_broken_models_are_found_again(script: ModuleType, name: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = script.judged_broken(script.CASES[name]())
    finally:
        torch.set_num_threads(threads)
    assert all(each["found"] for each in found["found"].values()), found
    assert found["unexpected"] == []


@pytest.mark.packages
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_all_broken_models_as_the_results_say(script: ModuleType) -> None:
    stored = {run["name"]: run for run in script.pages.stored("check")}
    torch.set_num_threads(1)
    for name, case in script.CASES.items():
        if "BN109" in stored[name]["found"]:
            continue  # what is slow on one machine need not be on another
        found = script.judged_broken(case())
        for code, each in found["found"].items():
            assert each["found"] == stored[name]["found"][code]["found"], (name, code, each)


def test_every_rule_has_two_broken_models_and_every_model_a_description(script: ModuleType) -> None:
    must: Counter[str] = Counter()
    for run in script.pages.stored("check"):
        if run["group"] == "broken":
            must.update(run["found"].keys())
            assert run["what"] == script.CASES[run["name"]].what
    assert set(must) == set(all_rules())
    assert min(must.values()) >= 2
    assert len(script.CASES) >= 64
    assert all(case.what for case in script.CASES.values())


def test_the_page_in_the_docs_is_what_the_results_say(script: ModuleType) -> None:
    runs = script.pages.stored("check")
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.pages.filled(page, script.tables(runs), script.PAGE) == page
    assert {run["name"] for run in runs} == {*script.corpus(), script.SPEED}
    healthy = [run for run in runs if run["group"] == "healthy"]
    assert len([run for run in healthy if run["source"] in ("torchvision", "timm", "shipped")]) >= 40


def test_the_bar(script: ModuleType) -> None:
    """At least 95 % of the mistakes are found, and no healthy model gets a warning."""
    runs = script.pages.stored("check")
    of = script.counted([run for run in runs if run["group"] == "broken"])
    assert of["found"] / of["must"] >= 0.95
    assert [run["name"] for run in runs if run["group"] == "healthy" and run["findings"]] == []


def made(
    script: ModuleType, model: nn.Module, expected: dict[str, str | None], **more: Any
) -> dict[str, Any]:
    cases = sys.modules["check_cases"]
    result: dict[str, Any] = script.judged_broken(cases.Broken(model, expected, **more))
    return result


def test_what_counts_as_found(script: ModuleType) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=0.9), nn.BatchNorm1d(4, track_running_stats=False))
    right = made(script, model, {"BN004": "0"})
    assert right["found"]["BN004"]["found"]
    assert [(each["code"], each["module"]) for each in right["unexpected"]] == [("BN011", "1")]
    follows = made(script, model, {"BN004": None}, follows=("BN011",))
    assert (follows["follows"], follows["unexpected"]) == (["BN011"], [])
    # Another layer, another severity, another rule.
    assert not made(script, model, {"BN004": "1"})["found"]["BN004"]["found"]
    wrong = made(script, model, {"BN004": "0"}, severity={"BN004": "error"})["found"]["BN004"]
    assert (wrong["found"], wrong["message"]) == (False, "warning at 0")
    assert made(script, model, {"BN001": None})["found"]["BN001"] == {
        "found": False,
        "severity": None,
        "message": "",
    }
    within: list[str] = []

    @contextlib.contextmanager
    def during() -> Any:
        within.append("in")
        yield
        within.append("out")

    made(script, model, {"BN004": "0"}, during=during)
    assert within == ["in", "out"]


def test_counts(script: ModuleType) -> None:
    def run(found: dict[str, str | None], follows: list[str], unexpected: list[str]) -> dict[str, Any]:
        return {
            "found": {code: {"found": bool(s), "severity": s, "message": ""} for code, s in found.items()},
            "follows": follows,
            "unexpected": [{"code": code, "severity": "warning", "message": "x"} for code in unexpected],
            "what": "a model",
        }

    runs = [
        run({"BN004": "warning", "BN005": "info"}, ["BN101"], []),
        run({"BN001": None}, [], ["BN108", "BN108", "BN103"]),
    ]
    # Right are BN004 and BN101, wrong BN108 and BN103; an info is neither.
    assert script.counted(runs) == {"models": 2, "must": 3, "found": 2, "right": 2, "wrong": 2}
    said = script.summary(runs, [])
    assert "2, 66.7 %" in said
    assert "2 of 4, 50.0 %" in said
    assert script.missed(runs).count("BN108 not expected") == 2
    assert "| BN001 | running statistics are not finite | error | 1 | 0 |" in script.by_rule(runs)


def test_a_run_goes_on_where_it_was(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script.pages, "RESULTS", tmp_path)
    ran: list[str] = []

    def corpus() -> Any:
        return {
            name: lambda name=name: (
                ran.append(name) or {"group": "healthy", "source": "x", "layers": 1, "findings": []}
            )
            for name in ("b", "a", "c")
        }

    monkeypatch.setattr(script, "corpus", corpus)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(sys, "argv", ["check_corpus", "b"])
    script.main()
    monkeypatch.setattr(sys, "argv", ["check_corpus"])
    script.main()
    assert ran == ["b", "a", "c"]
    stored = json.loads((tmp_path / "check.json").read_text())
    assert (stored["kind"], [run["name"] for run in stored["runs"]]) == ("check", ["a", "b", "c"])
    monkeypatch.setattr(sys, "argv", ["check_corpus", "c", "--again"])
    script.main()
    assert ran[3:] == ["c"]
    monkeypatch.setattr(sys, "argv", ["check_corpus", "z"])
    with pytest.raises(SystemExit):
        script.main()


def test_builders_make_the_same_model_again(script: ModuleType) -> None:
    """Seeded, whatever was drawn before."""
    states = []
    for _ in range(2):
        torch.rand(3)
        model = script.CASES["slow_momentum"]().model
        assert isinstance(model, nn.Module)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert batchnorm.check(states[0]).layers == 3
