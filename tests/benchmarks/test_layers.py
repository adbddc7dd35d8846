import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "layers.py"


@pytest.fixture(scope="module")
def layers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_layers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_case_is_measured_consistently(layers: ModuleType, activation: str | None) -> None:
    case = layers.Case((4, 6, 5, 5), True, activation)
    result = layers.measure(case, torch.device("cpu"), 5, copy=1e9)
    for times in (result.ours, result.torch):
        assert 0 < times.p20 <= times.p50 <= times.p80
    assert result.ratio == pytest.approx(result.torch.p50 / result.ours.p50)
    assert result.gigabytes_per_second * 1e9 * result.ours.p50 == pytest.approx(5 * 4 * 6 * 25 * 4)
    assert result.share_of_copy == pytest.approx(result.gigabytes_per_second)


def test_a_wrong_layer_is_not_timed(layers: ModuleType) -> None:
    case = layers.Case((64, 8), False, None)
    ours, theirs = layers.layers(case, torch.device("cpu"))
    ours.eps = 0.1
    x, dy = torch.randn(64, 8, requires_grad=True), torch.randn(64, 8)
    with pytest.raises(SystemExit, match="y is off by"):
        layers.agree(case, layers.gradients(ours, x, dy), layers.gradients(theirs, x, dy))


def test_json_is_complete(
    layers: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(layers, "CASES", [layers.Case((8, 3), False, None)])
    monkeypatch.setattr(layers, "copy_speed", lambda device: 1e9)
    monkeypatch.setattr(sys, "argv", ["layers.py", "--repeats", "5", "--threads", "1", "--json", "-"])
    layers.main()
    printed = json.loads(capsys.readouterr().out)
    assert printed["schema_version"] == 1
    assert printed["machine"]["torch"] == torch.__version__
    assert [result["case"] for result in printed["results"]] == ["8×3"]

    sys.argv[-1] = str(tmp_path / "results.json")
    layers.main()
    assert "8×3" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["results"][0]["backend"]
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    "arguments",
    [["--repeats", "1"], ["--device", "abacus"], ["--json", "no/such/folder/x.json"]],
    ids=" ".join,
)
def test_bad_arguments_end_with_one_line(
    layers: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["layers.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        layers.main()
    assert stop.value.code == 2
    assert f"got {arguments[0]}" in capsys.readouterr().err.splitlines()[-1]
