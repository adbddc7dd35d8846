import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_helpers import only_error
from typer.testing import Result

Run = Callable[..., Result]

NETS = """
import torch
from torch import nn

def make_net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2), nn.BatchNorm1d(2))

def make_loader():
    print("loading")
    x = torch.randn(128, 3, generator=torch.Generator().manual_seed(0)) * 3 + 1
    return [(part, "labels") for part in x.split(32)]

def no_loader(): return 3
def nothing(): return []
"""


@pytest.fixture(autouse=True)
def nets(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETS)


def saved(run: Run, tmp_path: Path, name: str = "old.pt") -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    layers = torch.nn.Sequential(
        torch.nn.Linear(3, 4),
        torch.nn.BatchNorm1d(4),
        torch.nn.ReLU(),
        torch.nn.Linear(4, 2),
        torch.nn.BatchNorm1d(2),
    )
    torch.save(layers.state_dict(), tmp_path / name)
    return layers.state_dict()


ARGUMENTS = ("recalibrate", "nets:make_net", "--data", "nets:make_loader", "-o", "new.pt")


@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_weights_in_weights_out(run: Run, tmp_path: Path, mode: str) -> None:
    old = saved(run, tmp_path)
    result = run(*ARGUMENTS, "--weights", "old.pt", "--mode", mode, "--json", "r.json")
    assert result.exit_code == 0, result.stderr
    assert f"recalibrated 2 layers ({mode}" in result.stdout
    assert "weights: new.pt" in result.stdout
    assert "loading" not in result.stdout
    new = torch.load(tmp_path / "new.pt", weights_only=True)
    assert list(new) == list(old)
    for name, value in new.items():
        assert torch.equal(value, old[name]) != ("running" in name or "tracked" in name), name
    x = torch.randn(128, 3, generator=torch.Generator().manual_seed(0)) * 3 + 1
    y = x.double() @ old["0.weight"].double().T + old["0.bias"].double()
    torch.testing.assert_close(new["1.running_var"].double(), y.var(0), rtol=1e-5, atol=1e-6)
    stored = json.loads((tmp_path / "r.json").read_text())
    assert (stored["kind"], stored["mode"], stored["samples"]) == ("recalibration", mode, 128)


def test_json_on_stdout_is_all_there_is(run: Run, tmp_path: Path) -> None:
    result = run(*ARGUMENTS, "--samples", "40", "--json", "-")
    stored = json.loads(result.stdout)
    assert (stored["stopped_by"], stored["samples"]) == ("samples", 64)
    assert (tmp_path / "new.pt").exists()


def test_a_checkpoint_with_more_in_it(run: Run, tmp_path: Path) -> None:
    old = saved(run, tmp_path)
    torch.save({"epoch": 3, "state_dict": old}, tmp_path / "checkpoint.pt")
    assert run(*ARGUMENTS, "--weights", "checkpoint.pt").exit_code == 0
    new = torch.load(tmp_path / "new.pt", weights_only=True)
    assert torch.equal(new["0.weight"], old["0.weight"])


def test_safetensors(run: Run, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    old = saved(run, tmp_path)
    safetensors.save_file(old, tmp_path / "old.safetensors")
    result = run(*ARGUMENTS[:-1], "new.safetensors", "--weights", "old.safetensors")
    assert result.exit_code == 0, result.stderr
    new = safetensors.load_file(tmp_path / "new.safetensors")
    assert torch.equal(new["0.weight"], old["0.weight"])
    assert new["1.num_batches_tracked"] == 4


def test_without_safetensors_it_says_what_to_install(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    assert "pip install safetensors" in only_error(run(*ARGUMENTS[:-1], "new.safetensors"))
    assert not list(tmp_path.glob("new*"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"-o": "missing/new.pt"}, "a folder that exists"),
        ({"--data": "nets:no_loader"}, "loader: got a int"),
        ({"--data": "nets:nothing"}, "loader: got no batch"),
        ({"--data": "nets:missing"}, "no 'missing' in nets"),
        ({"--weights": "missing.pt"}, "no such file"),
        ({"--weights": "nets.py"}, "got no file of torch.save"),
        ({"--weights": "broken.safetensors"}, "on reading it"),
        ({"--weights": "list.pt"}, "a list, expected a state dict"),
        ({"--weights": "other.pt"}, "no 0.bias"),
        ({"--weights": "shape.pt"}, "0.weight of shape (5, 5) for (4, 3)"),
        ({"--device": "nowhere"}, "--device: got nowhere"),
        ({"--json": "new.pt"}, "the same file as --out"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    run: Run, tmp_path: Path, change: dict[str, str], text: str
) -> None:
    old = saved(run, tmp_path)
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    torch.save({name: value for name, value in old.items() if name != "0.bias"}, tmp_path / "other.pt")
    torch.save({**old, "0.weight": torch.zeros(5, 5)}, tmp_path / "shape.pt")
    options = {"--data": "nets:make_loader", "-o": "new.pt", **change}
    arguments = [part for pair in options.items() for part in pair]
    result = run("recalibrate", "nets:make_net", *arguments)
    assert text in (result.stderr if "loader" in text else only_error(result))
    assert result.exit_code == 2
    assert not (tmp_path / "new.pt").exists()


def test_the_file_of_the_weights_is_not_written_over(run: Run, tmp_path: Path) -> None:
    state = saved(run, tmp_path)
    torch.save({"model": state, "epoch": 3}, tmp_path / "old.pt")
    (tmp_path / "link.pt").symlink_to(tmp_path / "old.pt")
    for out in ("old.pt", "link.pt"):
        result = run(*ARGUMENTS[:-1], out, "--weights", "old.pt")
        assert result.exit_code == 2
        assert "the file of --weights" in only_error(result)
    assert torch.load(tmp_path / "old.pt")["epoch"] == 3


def test_averaged_weights_are_those_of_the_model(run: Run, tmp_path: Path) -> None:
    state = saved(run, tmp_path)
    prefixed = {f"module.{name}": value for name, value in state.items()}
    torch.save({"n_averaged": torch.tensor(4), **prefixed}, tmp_path / "swa.pt")
    assert run(*ARGUMENTS, "--weights", "swa.pt").exit_code == 0
    new = torch.load(tmp_path / "new.pt")
    assert list(new) == list(state)
    assert torch.equal(new["0.weight"], state["0.weight"])
