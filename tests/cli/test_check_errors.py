"""What `batchnorm check` is given wrongly: one line, and nothing is written."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_helpers import only_error
from nets_to_check import NETS
from torch import nn
from typer.testing import Result

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def nets(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETS)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing.pt"], "got 'missing.pt', no such file, expected MODULE:FACTORY"),
        (["nets.healthy"], "as in nets:healthy."),
        (["nets.py"], "Give the function in it: nets:FACTORY."),
        (["."], "MODEL: got ., a folder"),
        (["nets:nothere"], "no 'nothere' in nets"),
        (["nets:fails"], "MODEL nets:fails raised RuntimeError: no such layer"),
        (["nets:number"], "expected a function that returns a torch.nn.Module"),
        (["whole.pt"], "could run any code"),
        (["list.pt"], "MODEL list.pt: got a list without tensors"),
        (["empty.pt"], "MODEL empty.pt: got a dict without tensors"),
        (["words.pt"], "MODEL words.pt: got no file of torch.save, expected"),
        (["hello.pt"], "MODEL hello.pt: got no file of torch.save, expected"),
        (["nothing.pt"], "MODEL nothing.pt: got an empty file, expected"),
        (["many:nothere"], "It has: f0, f1, f2, f3, f4, f5, f6, f7 and 2 more."),
        (["scripted.pt"], "MODEL scripted.pt: got RuntimeError on reading it"),
        (["broken.safetensors"], "MODEL broken.safetensors: got"),
        (["net.pt", "--data", "nets:same"], "--data: got nets:same beside the checkpoint net.pt"),
        (["net.pt", "--weights", "net.pt"], "--weights: got net.pt beside the checkpoint"),
        (["nets:keras", "--weights", "net.pt"], "expected the weights of this model"),
        (["nets:keras", "--select", "BN9"], "select: got 'BN9'"),
        (["nets:keras", "--ignore", "X"], "ignore: got 'X'"),
        (["nets:keras", "--select", "BN101"], "1 rule that needs batches (--data)."),
        (["net.pt", "--select", "BN004"], "1 rule that needs a model (MODULE:FACTORY)."),
        (["nets:keras", "--select", "BN017"], "1 rule that needs --averaged."),
        (["nets:keras", "--select", "BN017,BN014"], "2 rules that need --averaged, --optimizer."),
        (["net.pt", "--optimizer", "nets:decay"], "--optimizer: got nets:decay beside the checkpoint net.pt"),
        (["net.pt", "--averaged", "net.pt"], "--averaged: got net.pt beside the checkpoint net.pt"),
        (["net.pt", "--world-size", "4"], "--world-size: got 4 beside the checkpoint net.pt"),
        (["nets:keras", "--averaged", "nowhere.pt"], "--averaged: got nowhere.pt, no such file"),
        (["nets:keras", "--averaged", "net.pt"], "--averaged net.pt: got no conv.weight"),
        (["nets:keras", "--averaged", "whole.pt"], "--averaged whole.pt: got a file that holds more"),
        (["nets:keras", "--optimizer", "nets:nothere"], "no 'nothere' in nets"),
        (
            ["nets:keras", "--optimizer", "nets:number"],
            "got a function that takes no arguments, expected a function of",
        ),
        (
            ["nets:keras", "--optimizer", "nets:two"],
            "got a function that needs model, lr, expected a function of",
        ),
        (["nets:keras", "--optimizer", "nets:unpaid"], "--optimizer nets:unpaid raised TypeError: no lr"),
        (
            ["nets:keras", "--optimizer", "nets:parameters"],
            "expected a function of the model that returns a torch",
        ),
        (["nets:keras", "--averaged", "net.pt", "--json", "net.pt"], "net.pt, which is read"),
        (["nets:keras", "--format", "html"], "Add --out check.html"),
        (["nets:keras", "--format", "html", "-o", "r.txt"], "ends in .html"),
        (["nets:keras", "-o", "no/r.txt"], "mkdir -p no"),
        (["nets:keras", "--json", "no/r.json"], "mkdir -p no"),
        (["nets:keras", "-o", "r.json", "--json", "r.json"], "the same file as --out"),
        (["nets:keras", "--format", "github", "--json", "-"], "expected one result on stdout"),
        (["net.pt", "--json", "net.pt"], "net.pt, which is read"),
        (["nets:keras", "--device", "nowhere"], "--device: got nowhere"),
        (["nets:keras", "--data", "nets:fails"], "--data nets:fails raised RuntimeError"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    run: Run, tmp_path: Path, arguments: list[str], says: str
) -> None:
    torch.save(nn.Sequential(nn.BatchNorm1d(2)), tmp_path / "whole.pt")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    torch.save({}, tmp_path / "empty.pt")
    torch.save(nn.BatchNorm1d(2).state_dict(), tmp_path / "net.pt")
    (tmp_path / "words.pt").write_text("no weights")
    (tmp_path / "hello.pt").write_text("hello world")
    (tmp_path / "nothing.pt").touch()
    (tmp_path / "many.py").write_text("".join(f"def f{number}(): ...\n" for number in range(10)))
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    _scripted(tmp_path / "scripted.pt")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert says in only_error(run("check", *arguments))
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def _scripted(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.BatchNorm1d(3)).save(str(path))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("nets:flat", "check: batch 1 in train mode: got RuntimeError: Expected 3D"),
        ("nets:mixed", "got a dict of y, expected the arguments of the model's forward by name"),
        ("nets:nothing", "check: batches: got none"),
        ("nets:number", "batches: got a int"),
    ],
)
def test_batches_that_do_not_fit_are_one_line(run: Run, data: str, says: str) -> None:
    result = run("check", "nets:keras", "--data", data)
    assert result.exit_code == 2
    assert result.stdout == ""
    (error,) = [line for line in result.stderr.splitlines() if not line.startswith("running ")]
    assert error.startswith("error: ")
    assert says in error
    assert len(error) < 800
