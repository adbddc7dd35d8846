"""The run behind docs/fuse.md: the page's tables are the results' own, and the counting is right."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from benchmark_scripts import load
from torch import nn
from torch.nn import functional as F

import batchnorm


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load("fuse")
    # set_chain writes there; put back what was.
    monkeypatch.setattr(batchnorm.ops, "CHAIN", batchnorm.ops.CHAIN)
    monkeypatch.setattr(batchnorm.ops.recompute, "CHAIN", batchnorm.ops.recompute.CHAIN)
    return module


def small(name: str = "") -> nn.Module:
    convs = [
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3),
        nn.BatchNorm2d(6),
    ]
    return nn.Sequential(
        *convs, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 1000)
    )


def test_a_small_run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the resident size is read as Linux tells it")
    monkeypatch.setattr(script, "RESULTS", tmp_path / "fuse.json")
    monkeypatch.setattr(script, "PAGE", tmp_path / "fuse.md")
    monkeypatch.setattr(script, "network", small)
    monkeypatch.setattr(script, "SIZE", 12)
    monkeypatch.setattr(script, "READ_BATCH", 3)
    monkeypatch.setattr(script, "ROUNDS", 2)

    def here(variant: str, chain: int) -> dict[str, float]:
        """A small network makes the process no larger."""
        found = script.memory_here(variant, chain)
        return {**found, "read": found["read"] + 1e6, "peak": found["peak"] + 1e6}

    monkeypatch.setattr(script, "elsewhere", here)
    names = ("memory", "networks", "time", "chains")
    (tmp_path / "fuse.md").write_text(
        "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\nbetween\n" for name in names)
    )
    monkeypatch.setattr(sys, "argv", ["fuse.py", *(f"--{name}" for name in (*names, "again")), "--docs"])
    script.main()
    stored = json.loads((tmp_path / "fuse.json").read_text())
    runs = stored["memory"]["runs"]
    assert runs["keep"]["first_loss"] == runs["recompute"]["first_loss"] == runs["chain 1"]["first_loss"]
    # The second convolution keeps 6 channels of 10x10; a mean keeps nothing. Weight and bias have copies.
    kept = 4 * (6 * 10 * 10 * script.COUNTED_BATCH - 2 * 6)
    counted = stored["networks"]["counted"]["resnet18"]
    assert counted["keep"] - counted["recompute"] == kept
    assert {len(each) for each in stored["time"]["seconds"].values()} == {2}
    assert stored["again"]["elements"]["chain 2"] == 6 * 10 * 10
    written = (tmp_path / "fuse.md").read_text()
    assert "old" not in written
    assert written.count("between") == 4


def test_what_is_counted(script: ModuleType) -> None:
    """Each storage once, whoever holds it; what is given as known is left out."""
    x, weight = torch.randn(10, 4), torch.randn(4, 4, requires_grad=True)
    y = x @ weight
    z = y.exp()
    loss = (z * z.view(4, 10).view(10, 4) + y.square()).sum()
    assert script.counted(loss, []) == 4 * (40 + 40 + 40)
    assert script.counted(loss, [x]) == 4 * (40 + 40)


def test_a_recipe_counts_by_what_it_holds(script: ModuleType) -> None:
    x = torch.randn(5, 8, requires_grad=True)
    kept = {}
    for memory in ("keep", "recompute"):
        net = nn.Sequential(batchnorm.BatchNorm1d(8, activation="relu"), nn.Linear(8, 3))
        net = batchnorm.fuse(net, memory=memory).model
        kept[memory] = script.counted(F.mse_loss(net(x), torch.zeros(5, 3)), list(net.parameters()))
    # The output of 160 bytes; weight and bias have copies, 32 bytes each.
    assert kept["keep"] - kept["recompute"] == 160 - 64


def test_the_page_in_the_docs_is_what_the_results_say(script: ModuleType) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    stored = json.loads(script.RESULTS.read_text(encoding="utf-8"))
    assert script.filled(page, stored) == page
    runs = stored["memory"]["runs"]
    assert runs["recompute"]["read"] < 0.7 * runs["plain"]["read"]
    assert runs["recompute"]["counted"] < 0.7 * runs["plain"]["counted"]
