"""What watching costs: how it is measured and told, and that the page has what was measured."""

from pathlib import Path
from types import ModuleType

import pytest
from benchmark_scripts import load

pytest.importorskip("tensorboard")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("watch")


def test_two_networks_take_turns_and_end_alike(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "FILE", tmp_path / "watch.json")
    make, title, _, _ = script.CASES["conv"]
    monkeypatch.setitem(script.CASES, "conv", (make, title, 3, 4))
    script.keep("conv", script.measured("conv"))
    (case,) = script.stored().values()
    assert [len(times) for times in case["times"].values()] == [4, 4]
    assert case["looks"] >= 1
    assert "MLP" not in script.tables()["cost"]


def test_how_costs_are_told(script: ModuleType) -> None:
    case = {"steps": 100, "looks": 7, "times": {"plain": [1.0, 1.0, 2.0], "watched": [1.1, 1.02, 2.04]}}
    assert script.row("net", case) == ["net", "10", "300", "7", "+2.0 % (+2.0 to +6.8)", "+4.0 %"]


def test_the_page_in_the_docs_is_what_was_measured(script: ModuleType) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.filled(page, script.tables(), script.PAGE) == page
    assert set(script.stored()) == set(script.CASES)
