import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_models import RANDOM, constants_of, count, model, node, norm, onnx, run, statistics
from surgery_helpers import randomize
from torch import nn
from typer.testing import Result

import batchnorm
from batchnorm.cli._weights import load_weights
from batchnorm.surgery import _model_files

NETS = """
import torch
from torch import nn

def make():
    print("made")
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
"""


@pytest.fixture
def invoke(request: pytest.FixtureRequest) -> Callable[..., Result]:
    """The command line; `run` runs an ONNX model here."""
    found: Callable[..., Result] = request.getfixturevalue("run")
    return found


X = RANDOM.normal(size=(1, 3, 6, 6)).astype(np.float32)


@pytest.fixture
def net(tmp_path: Path, invoke: object) -> nn.Module:
    (tmp_path / "nets.py").write_text(NETS, "utf-8")
    layers = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)
    return randomize(nn.Sequential(*layers)).eval()


@pytest.fixture
def file(tmp_path: Path, invoke: object) -> Path:
    constants = {"w": RANDOM.normal(size=(16, 3, 3, 3))} | statistics(16) | statistics(16, "bn2")
    nodes = [node("Conv", "x w", "c"), norm("c", "n"), node("Relu", "n", "r"), norm("r", "y", "bn2")]
    onnx.save(model(nodes, constants, X.shape, dtype="float32"), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def test_an_onnx_file(invoke, file: Path) -> None:
    before = file.read_bytes()
    result = invoke("fold", "net.onnx", "-o", "folded.onnx", "--example", "1x3x6x6", "--json", "report.json")
    assert result.exit_code == 0, result.output
    assert "1 of 2 batch norms folded" in result.stdout
    assert "folded into c, which has a bias now" in " ".join(result.stdout.split())
    assert "on the example, y: max abs error" in result.stdout
    assert file.read_bytes() == before
    folded = onnx.load("folded.onnx")
    assert count(folded) == 1
    np.testing.assert_allclose(run(folded, X)[0], run(onnx.load(file), X)[0], rtol=1e-4, atol=1e-5)
    report = json.loads(Path("report.json").read_text("utf-8"))
    assert report["kind"] == "changes"
    assert [each["name"] for each in report["changed"]] == ["bn"]
    assert [each["name"] for each in report["skipped"]] == ["bn2"]
    assert sorted(each.name for each in Path().iterdir()) == ["folded.onnx", "net.onnx", "report.json"]


def test_json_to_stdout(invoke, file: Path) -> None:
    result = invoke("fold", "net.onnx", "-o", "folded.onnx", "--json", "-")
    assert json.loads(result.stdout)["operation"] == "fold"
    assert "folded: folded.onnx" in result.stderr


def test_weights_beside_the_file(invoke, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = onnx.load(file)
    expected = run(loaded, X)[0]
    onnx.save(loaded, file, save_as_external_data=True, location="net.bin", size_threshold=0)
    assert invoke("fold", "net.onnx", "-o", "folded.onnx").exit_code == 0
    np.testing.assert_allclose(run(onnx.load("folded.onnx"), X)[0], expected, rtol=1e-4, atol=1e-5)
    os.link("net.bin", "other.onnx")
    result = invoke("fold", "net.onnx", "-o", "other.onnx")
    assert result.exit_code == 2
    assert "which is read" in result.stderr
    Path("other.onnx").unlink()
    # As if the weights were too many for one file.
    monkeypatch.setattr(_model_files, "_ONE_FILE", 10)
    result = invoke("fold", "net.onnx", "-o", "large.onnx", "--example", "1x3x6x6")
    assert result.exit_code == 0, result.output
    assert "folded: large.onnx.data" in result.stdout
    assert Path("large.onnx").stat().st_size < Path("large.onnx.data").stat().st_size
    np.testing.assert_allclose(run(onnx.load("large.onnx"), X)[0], expected, rtol=1e-4, atol=1e-5)
    assert constants_of(onnx.load("large.onnx")).keys() == constants_of(onnx.load("folded.onnx")).keys()
    assert not list(Path().glob(".batchnorm-*"))


def test_an_exported_program(invoke, net: nn.Module) -> None:
    x = torch.from_numpy(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(net, (x,)), "net.pt2")
    result = invoke("fold", "net.pt2", "-o", "folded.pt2", "--example", "1x3x6x6")
    assert result.exit_code == 0, result.output
    again = torch.export.load("folded.pt2").module()(x)
    torch.testing.assert_close(again, net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("nested", ["", "state_dict", "model_state_dict", "model", "module."])
def test_a_model_and_its_weights(invoke, net: nn.Module, suffix: str, nested: str) -> None:
    if suffix == ".safetensors":
        if nested:
            pytest.skip("the format has no nesting")
        pytest.importorskip("safetensors.torch").save_file(net.state_dict(), "net.safetensors")
    else:
        state = net.state_dict()
        if nested == "module.":  # as AveragedModel and DistributedDataParallel save them
            state = {f"module.{name}": value for name, value in state.items()}
        elif nested:
            state = {nested: state, "epoch": 3}
        torch.save(state, f"net{suffix}")
    arguments = ("fold", "nets:make", "--weights", f"net{suffix}", "-o", f"folded{suffix}")
    result = invoke(*arguments, "--example", "1x3x6x6")
    assert result.exit_code == 0, result.output
    assert "made" not in result.stdout
    layers = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)
    fresh = batchnorm.fold(nn.Sequential(*layers).eval()).model
    load_weights(fresh, Path(f"folded{suffix}"))
    x = torch.from_numpy(X)
    torch.testing.assert_close(fresh(x), net(x), rtol=1e-4, atol=1e-5)


def test_nothing_to_fold_is_fine(invoke, tmp_path: Path) -> None:
    onnx.save(model([node("Relu", "x", "y")], {}, X.shape), tmp_path / "net.onnx")
    result = invoke("fold", "net.onnx", "-o", "folded.onnx")
    assert result.exit_code == 0
    assert "No batch norm found" in result.stdout
    assert Path("folded.onnx").is_file()
    assert "torch.onnx.export fold it themselves" in " ".join(result.stdout.split())
    assert batchnorm.fold("net.onnx").notes[0] == "the model has no batch norm"


def test_without_safetensors_it_says_what_to_install(invoke, net: nn.Module, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    result = invoke("fold", "nets:make", "-o", "out.safetensors")
    assert result.exit_code == 2
    assert "pip install safetensors" in result.stderr
    assert result.stdout == ""
    assert not Path("out.safetensors").exists()


@pytest.mark.parametrize("how", ["same", "symlink", "hard link", "other name"])
def test_the_input_is_not_written_over(invoke, file: Path, how: str) -> None:
    before = file.read_bytes()
    target = "net.onnx" if how == "same" else "sub/../net.onnx" if how == "other name" else "out.onnx"
    Path("sub").mkdir()
    if how == "symlink":
        Path(target).symlink_to("net.onnx")
    if how == "hard link":
        os.link("net.onnx", target)
    result = invoke("fold", "net.onnx", "-o", target)
    assert result.exit_code == 2
    assert "which is read, expected another file than the input" in result.stderr
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("net.onnx", "-o", "out.pt2"), "expected a file that ends in .onnx"),
        (("net.onnx", "-o", "no/out.onnx"), "mkdir -p no"),
        (("none.onnx", "-o", "out.onnx"), "none.onnx, which is not there"),
        (("broken.onnx", "-o", "out.onnx"), "expected a file that holds a .onnx model"),
        (("broken.pt2", "-o", "out.pt2"), "expected a file that holds a .pt2 model"),
        (("net.onnx", "-o", "out.onnx", "--weights", "w.pt"), "holds its own weights"),
        (("net.onnx", "-o", "out.onnx", "--example", "1,3"), "numbers with an x between them"),
        (("net.onnx", "-o", "out.onnx", "--example", "1x4x6x6"), "model on the example"),
        (
            ("net.onnx", "-o", "out.onnx", "--example", "1x3x6x6", "--example", "1"),
            "got 2 shapes, expected 1",
        ),
        (("net.onnx", "-o", "out.onnx", "--json", "out.onnx"), "the same file"),
        (("net.onnx", "-o", "out.onnx", "--json", "net.onnx"), "which is read"),
        (("nets", "-o", "out.pt"), "expected a .onnx or a .pt2 file, or MODULE:FACTORY"),
        ((".", "-o", "out.onnx"), "got '.', expected a .onnx or a .pt2 file, or MODULE:FACTORY"),
        (("code.pt", "-o", "out.pt"), "my_nets:make_net --weights code.pt"),
        (
            ("code.pt2", "-o", "out.pt2"),
            "code.pt2: got RuntimeError: PytorchStreamReader failed locating file",
        ),
        (("nets:make", "-o", "out.onnx"), "ends in .safetensors or .pt or .pth"),
        (("nets:none", "-o", "out.pt"), "no 'none' in nets"),
        (("nets:make", "--weights", "none.pt", "-o", "out.pt"), "none.pt, no such file"),
        (("nets:make", "--weights", "other.pt", "-o", "out.pt"), "expected the weights of this model"),
        (("nets:make", "--weights", "code.pt", "-o", "out.pt"), "could run any code"),
        (("nets:make", "--weights", "list.pt", "-o", "out.pt"), "a list, expected a state dict"),
        (("nets:make", "--weights", "broken.safetensors", "-o", "out.pt"), "expected a state dict"),
        (("nets:make", "--weights", "w.bin", "-o", "out.pt"), "w.bin, no such file"),
        (("nets:make", "--weights", "other.pt", "-o", "other.pt"), "which is read"),
    ],
)
def test_bad_input_writes_nothing(invoke, net, file: Path, arguments: tuple[str, ...], text: str) -> None:
    for name in ("broken.onnx", "broken.pt2", "broken.safetensors"):
        Path(name).write_bytes(b"\x01nothing")
    torch.save({"0.weight": torch.zeros(2)}, "other.pt")
    torch.save(net, "code.pt")
    torch.save(net, "code.pt2")
    torch.save([1], "list.pt")
    before = {each: each.read_bytes() for each in Path().iterdir() if each.is_file()}
    result = invoke("fold", *arguments)
    assert result.exit_code == 2, result.output
    assert text in result.stderr
    assert result.stderr.count("error: ") == 1
    assert {each: each.read_bytes() for each in Path().iterdir() if each.is_file()} == before


def test_what_pytorch_logs_about_a_broken_program_is_not_shown(invoke, net: nn.Module) -> None:
    torch.save(net, "code.pt2")
    shown: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = shown.append
    logger = logging.getLogger("torch.export")
    logger.addHandler(handler)
    try:
        with pytest.raises(batchnorm.ModelError, match="failed locating file"):
            batchnorm.fold("code.pt2")
        assert not shown
        logger.warning("and afterwards it is")
        assert len(shown) == 1
    finally:
        logger.removeHandler(handler)


def test_a_file_that_cannot_be_written_leaves_nothing(invoke, file: Path, monkeypatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    result = invoke("fold", "net.onnx", "-o", "out.onnx")
    assert result.exit_code == 2
    assert "No space left" in result.stderr
    assert sorted(each.name for each in Path().iterdir()) == ["net.onnx"]
