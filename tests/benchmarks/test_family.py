"""The runs behind docs/family.md: what a process is given, and that tables and figure are the results' own."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from benchmark_scripts import load
from torch import nn

import batchnorm

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("family")


@pytest.fixture(scope="module")
def cost() -> ModuleType:
    return load("family_cost")


def test_processes_share_a_batch_and_sorted_ones_have_a_class(script: ModuleType) -> None:
    y = torch.arange(1000) % 10
    shares = [script.drawn(y, "sorted", 16, 0, 3, rank) for rank in range(4)]
    assert [len(y[share].unique()) for share in shares] == [1] * 4
    assert len({int(y[share[0]]) for share in shares}) > 1
    again = script.drawn(y, "sorted", 16, 0, 3, 2)
    assert torch.equal(again, shares[2])
    mixed = torch.cat([script.drawn(y, "random", 16, 0, 3, rank) for rank in range(4)])
    assert len(y[mixed].unique()) == 10
    assert len(mixed.unique()) > 50


def test_every_kind_is_the_layer_that_it_is_called(script: ModuleType) -> None:
    kinds = {"plain": nn.BatchNorm2d, "renorm": batchnorm.BatchRenorm, "sync": batchnorm.SyncBatchNorm}
    assert list(script.SPLIT) == list(kinds)
    for kind, cls in {**kinds, "ghost": batchnorm.GhostBatchNorm}.items():
        layers = [module for module in script.made(0, kind, 8).modules() if hasattr(module, "running_var")]
        assert [type(layer) for layer in layers] == [cls] * 4
        if kind == "ghost":
            assert all(layer.ghost_size == 8 for layer in layers)


def test_a_short_training(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "STEPS", 3)
    x, y = torch.rand(100, 1, 8, 8), torch.arange(100) % 10
    model = script.made(0, "ghost", 2)
    before = [p.detach().clone() for p in model.parameters()]
    script.trained(model, (x, y), 0, "random", 2, range(4))
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert model[1].num_batches_tracked == 3


def test_the_page_shows_the_results(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "FIGURE", tmp_path / "family.svg")
    page = script.PAGE.read_text(encoding="utf-8")
    tables = script.tables(script.pages.stored("family"))
    assert script.pages.filled(page, tables, script.PAGE) == page
    drawn = (tmp_path / "family.svg").read_text(encoding="utf-8")
    assert drawn.count("<svg") == 1
    for name in script.NAMES.values():
        assert name in drawn


def test_the_costs_are_those_of_the_results(cost: ModuleType) -> None:
    page = cost.PAGE.read_text(encoding="utf-8")
    tables = cost.tables(cost.pages.stored("family_cost"))
    assert cost.pages.filled(page, tables, cost.PAGE) == page


def test_costs_of_a_short_run(cost: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "SHAPES", {"small": (8, 32, 3, 3), "table": (32, 32)})
    monkeypatch.setattr(cost, "ROUNDS", 1)
    monkeypatch.setattr(cost, "THREADS", 1)
    times = cost.one_run(0)["milliseconds"]
    assert list(times) == ["small", "table"]
    assert all(spent > 0 for each in times.values() for spent in each.values())
    assert len(times["small"]) == 9
