import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from benchmark_scripts import load
from torch import Tensor

from batchnorm.comparison.datasets import read_hours


@pytest.fixture(scope="module")
def bikes() -> ModuleType:
    return load("bikeshare")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Ten days of 24 hours, each with a temperature of its own."""
    rows = ["day,hr,workingday,temp,atemp,hum,windspeed,bikers"]
    for day in range(1, 11):
        heat = day / 10
        rows += [
            f"{day},{hr},{day % 2},{heat},{heat + hr / 100},0.5,{hr / 24},{day * hr}" for hr in range(24)
        ]
    path = tmp_path / "Bikeshare.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def columns(table: Path) -> tuple[Tensor, Tensor, Tensor]:
    hours = read_hours(table)
    return hours.x, hours.y, hours.day


def test_days_are_held_out_whole(bikes: ModuleType, table: Path) -> None:
    x, y, day = columns(table)
    assert x.shape == (240, 7)
    assert y[5].item() == pytest.approx(math.log(6))
    split = bikes.split_days(x, y, day, seed=0)
    assert not set(split.day.tolist()) & set(split.day_test.tolist())
    assert len(split.x_test) == 48
    by_day = bikes.batches(split, "by day")
    assert sorted(len(rows) for rows in by_day) == [24] * 8
    assert all(len(split.day[rows].unique()) == 1 for rows in by_day)
    assert all(len(split.day[rows].unique()) > 1 for rows in bikes.batches(split, "shuffled"))


def test_recalibration_is_the_pooled_mean_and_variance(bikes: ModuleType, table: Path) -> None:
    split = bikes.split_days(*columns(table), seed=0)
    model = bikes.train(split, "by day", seed=0, epochs=1)
    first = model[0](split.x).double()
    off = (model[1].running_mean - first.mean(0)).abs().max()
    bikes.recalibrate(model, split.x)
    torch.testing.assert_close(model[1].running_mean.double(), first.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[1].running_var.double(), first.var(0), rtol=1e-4, atol=1e-6)
    assert off > 1e-3


def test_a_test_leaves_the_network_as_it_was(bikes: ModuleType, table: Path) -> None:
    split = bikes.split_days(*columns(table), seed=0)
    model = bikes.train(split, "shuffled", seed=0, epochs=1)
    errors = {kind: bikes.test(model, split, kind) for kind in bikes.STATISTICS}
    assert len(set(errors.values())) == 3
    assert bikes.test(model, split, "running") == errors["running"]


def test_the_report_is_complete(
    bikes: ModuleType,
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "out.json"
    monkeypatch.setattr(bikes, "bike_hours", lambda: read_hours(table))
    monkeypatch.setattr(sys, "argv", ["bikeshare.py", "--seeds", "2", "--epochs", "1", "--json", str(target)])
    bikes.main()
    report = json.loads(target.read_text("utf-8"))
    assert (report["kind"], report["schema_version"]) == ("bikeshare-benchmark", 1)
    assert report["machine"]["torch"] == torch.__version__
    assert report["setup"]["days"] == 10
    assert [(row["training"], row["statistics"]) for row in report["results"]] == [
        (training, kind) for training in bikes.TRAININGS for kind in (*bikes.STATISTICS, bikes.CONTROL)
    ]
    assert all(len(row["errors"]) == 2 for row in report["results"])
    assert f"{report['results'][0]['mean']:.3f}" in capsys.readouterr().out


def test_a_missing_package_is_named_with_its_command(
    bikes: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["bikeshare.py", "--json", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit, match="pip install --no-deps islp"):
        bikes.main()


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--json", "no/such/folder/x.json"]], ids=" ".join)
def test_bad_arguments_end_with_one_line(
    bikes: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["bikeshare.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        bikes.main()
    assert stop.value.code == 2
    assert f"got {arguments[0]}" in capsys.readouterr().err.splitlines()[-1]
