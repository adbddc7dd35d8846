"""The run behind docs/recalibrate.md: the page's tables are the results' own."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from benchmark_scripts import load
from torch import nn


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("recalibrate")


def made(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten classes of noisy patterns."""
    y = torch.arange(count) % 10
    patterns = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return patterns[y] + 0.1 * torch.rand(count, 1, 8, 8), y


def test_a_small_run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(script.pages, "RESULTS", tmp_path)
    monkeypatch.setattr(script, "PAGE", tmp_path / "recalibrate.md")
    monkeypatch.setattr(script, "STEPS", 20)
    monkeypatch.setattr(script, "mnist", lambda: made(200))
    monkeypatch.setattr(script, "digits", lambda: made(100))
    monkeypatch.setattr(sys, "argv", ["recalibrate.py", "--seeds", "1", "--docs"])
    page = "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\nbetween\n" for name in ("accuracy", "distance"))
    (tmp_path / "recalibrate.md").write_text(page)
    script.main()
    (run,) = json.loads((tmp_path / "recalibrate.json").read_text())["runs"]
    assert run["passes"] == 4
    assert run["distance"]["shuffled"]["sequential"] == [0.0, 0.0]
    written = (tmp_path / "recalibrate.md").read_text()
    assert "old" not in written
    assert written.count("between") == 2
    assert f"{100 * run['accuracy']['shuffled']['joint']:.1f} %" in written


def test_a_digit_fills_its_box() -> None:
    image = torch.zeros(1, 28, 28)
    image[0, 4:20, 8:16] = 1.0
    assert torch.equal(load("digit_runs").cropped(image), torch.ones(1, 8, 8))


def test_a_sorted_stream_has_one_class_in_most_batches(script: ModuleType) -> None:
    for order, size in script.ORDERS.items():
        batches = script.ordered(made(640), order, 0)
        assert len(batches[0][1]) == size
        alone = sum(len(y.unique()) == 1 for _, y in batches) == len(batches)
        assert alone == order.startswith("sorted")


def test_distance_is_in_units_of_the_true_sigma(script: ModuleType) -> None:
    one, true = nn.Sequential(nn.BatchNorm2d(2, eps=0.0)), nn.Sequential(nn.BatchNorm2d(2, eps=0.0))
    true[0].running_var.fill_(4.0)
    one[0].running_mean[1] = 3.0
    assert script.distance(one, true) == [1.5, 0.5]


def test_the_page_in_the_docs_is_what_the_results_say(script: ModuleType) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    runs = script.pages.stored("recalibrate")
    assert script.pages.filled(page, script.tables(runs), script.PAGE) == page
    assert len(runs) == 5
