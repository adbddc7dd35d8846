"""The times of a folded network: how they are taken and told, and that the page has those that were measured."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from benchmark_scripts import load
from surgery_helpers import randomize
from torch import nn

import batchnorm


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("fold_speed")


def net() -> nn.Module:
    return randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).eval()


def test_all_networks_compute_the_same(script: ModuleType) -> None:
    found = script.networks(net())
    assert list(found) == list(script.NAMES)
    x = torch.randn(2, 3, 8, 8)
    for model in found.values():
        assert not model.training
        torch.testing.assert_close(model(x), found["torch"](x), rtol=1e-4, atol=1e-5)
    assert type(found["torch"][1]) is nn.BatchNorm2d
    assert type(found["convert"][1]) is batchnorm.BatchNorm2d
    assert found["fuse"][1].activation == "relu"
    assert isinstance(found["fold"][1], nn.Identity)


def test_a_network_that_is_not_folded_is_not_timed(script: ModuleType) -> None:
    with pytest.raises(SystemExit, match="batch norms that are not folded"):
        script.networks(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)).eval())


def test_cases_are_kept_one_by_one(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "FILE", tmp_path / "speed.json")
    found = script.networks(net())
    for name in ("contiguous-1", "channels-last-16"):
        script.keep(name, script.measured(found, *script.CASES[name], rounds=1))
    stored = json.loads((tmp_path / "speed.json").read_text())["cases"]
    assert list(stored) == ["contiguous-1", "channels-last-16"]
    assert set(stored["contiguous-1"]["times"]) == set(script.NAMES)
    head = script.tables()["fold"].splitlines()[0]
    assert head.endswith("| contiguous, batch 1 | channels-last, batch 16 |")


def test_how_times_are_told(script: ModuleType) -> None:
    assert script.spread({"p20": 0.0101, "p50": 0.01234, "p80": 0.0156}) == "12.3 (10.1 to 15.6)"
    assert script.spread({"p20": 0.9, "p50": 1.0, "p80": 1.25}) == "1000 (900 to 1250)"
    assert script.ratio([2.0, 4.0, 6.0], [1.0, 1.0, 1.0]) == "4.00× (2.80 to 5.20)"


def test_the_page_in_the_docs_is_what_was_measured(script: ModuleType) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.filled(page, script.tables(), script.PAGE) == page
    assert set(script.stored()) == set(script.CASES)
