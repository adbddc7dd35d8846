"""The runs behind the pages of the tools: what each measures, and that the pages' tables are the results' own."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmark_scripts import load
from torch import nn

import batchnorm

SCRIPTS = {"adapting": 5, "averaging": 10, "changing": 5, "decay": 10, "merging": 10}
Main = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request: pytest.FixtureRequest) -> ModuleType:
    return load(request.param)


def made(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten classes of noisy patterns."""
    random = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 10
    patterns = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    return patterns[y] + 0.1 * torch.rand(count, 1, 8, 8, generator=random), y


def short(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of a few steps, on made-up patterns."""
    small = {"STEPS": 12, "START": 4, "EVERY": 2, "ROUNDS": 2, "LABELLED": 40, "TUNING": 3, "BATCHES": (8,)}
    small |= {"SIZES": (1, 16), "PRIORS": (0, 16)}
    for name, value in small.items():
        if hasattr(script, name):
            monkeypatch.setattr(script, name, value)
    for name, value in {
        "mnist": lambda: made(200),
        "digits": lambda: made(120, 1),
        "mnist_parts": lambda: (made(200), made(100, 1)),
    }.items():
        if hasattr(script, name):
            monkeypatch.setattr(script, name, value)


def test_a_small_run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One seed after the other, each kept, none run twice; the page gets its tables and keeps its text."""
    short(script, monkeypatch)
    kind = script.__name__.removeprefix("benchmark_")
    ran: list[int] = []
    whole = script.run
    page = script.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(script.pages, "RESULTS", tmp_path)
    monkeypatch.setattr(script, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(script, "run", lambda seed: ran.append(seed) or whole(seed))
    (tmp_path / "page.md").write_text(page)
    monkeypatch.setattr(sys, "argv", [kind, "--seeds", "1"])
    script.main()
    monkeypatch.setattr(sys, "argv", [kind, "--seeds", "2", "--docs"])
    script.main()
    assert ran == [0, 1]
    stored = json.loads((tmp_path / f"{kind}.json").read_text())
    assert (stored["kind"], [run["seed"] for run in stored["runs"]]) == (kind, [0, 1])
    written = (tmp_path / "page.md").read_text()
    assert written != page
    assert script.pages.filled(page, script.tables(script.pages.stored(kind)), "page") == written
    assert written.splitlines()[0] == page.splitlines()[0]


def test_the_page_in_the_docs_is_what_the_results_say(script: ModuleType) -> None:
    kind = script.__name__.removeprefix("benchmark_")
    runs = script.pages.stored(kind)
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.pages.filled(page, script.tables(runs), script.PAGE) == page
    assert [run["seed"] for run in runs] == list(range(SCRIPTS[kind]))


def test_what_is_said_of_a_difference() -> None:
    pages = load("pages")
    assert pages.points([0.5, 0.6, 0.7], [0.4, 0.5, 0.6]) == "+10.0 (+10.0 to +10.0)"
    assert pages.points([0.5, 0.6], [0.4, 0.8]).endswith(": no difference seen")
    assert pages.percent([0.5]) == "50.0 %"
    assert pages.percent([0.5, 0.5]) == "50.0 % (50.0 to 50.0)"
    assert pages.markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |\n"
    with pytest.raises(SystemExit, match="0 places marked x"):
        pages.filled("", {"x": ""}, "page")


def test_clients_of_two_classes_have_two_each() -> None:
    script = load("merging")
    torch.manual_seed(0)
    parts = script.shards(made(200), "skewed")
    assert [len(y.unique()) for _, y in parts] == [2] * 5
    assert sum(len(y) for _, y in parts) == 200
    assert [len(y) for _, y in script.shards(made(200), "mixed")] == [40] * 5


def test_the_naive_rule_of_merging_leaves_out_what_lies_between_the_means() -> None:
    script = load("merging")
    states = [{"mean": torch.tensor([0.0]), "var": torch.tensor([1.0])}]
    states.append({"mean": torch.tensor([10.0]), "var": torch.tensor([3.0])})
    found = script.averaged(states, [1.0, 3.0])
    assert (found["mean"].item(), found["var"].item()) == (7.5, 2.5)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)).eval()
    x, y = made(200)
    batchnorm.recalibrate(model, [x], tolerance=0)
    errors = script.exactness(model, [(x[y < 5], y[y < 5]), (x[y >= 5], y[y >= 5])])
    assert errors["merged"] < 1e-5 < errors["naive"]


def test_one_broken_image_spoils_pytorch_s_statistics_and_no_weight() -> None:
    script = load("changing")
    torch.manual_seed(0)
    model = script.network(bias=True)
    batchnorm.recalibrate(model, [made(200)[0]], tolerance=0)
    weights = [p.clone() for p in model.parameters()]
    found = script.poisoned(model.eval(), made(200), made(100, 1))
    assert found["batchnorm"] == found["before"]
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), weights, strict=True))
