import json
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import Result

import batchnorm
from batchnorm import _environment


def test_the_table_names_versions_and_the_backend(run: Callable[..., Result]) -> None:
    result = run("env")
    assert result.exit_code == 0
    backend = batchnorm.explain_backend(torch.empty(2, 1)).chosen
    for part in (batchnorm.__version__, torch.__version__, platform.python_version(), backend, "cpu"):
        assert part in result.stdout


def test_json_on_stdout_is_all_there_is(run: Callable[..., Result]) -> None:
    result = run("env", "--json", "-")
    content = json.loads(result.stdout)
    assert (content["kind"], content["schema_version"]) == ("environment", 1)
    assert content["devices"][0]["name"] == "cpu"
    assert content["threads"] == torch.get_num_threads()
    assert result.stderr == ""


def test_json_in_a_file(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run("env", "--json", "env.json")
    assert result.exit_code == 0
    assert json.loads((tmp_path / "env.json").read_text())["torch"] == torch.__version__
    assert "json: env.json" in result.stdout


def test_a_path_that_cannot_be_written_is_one_line(run: Callable[..., Result]) -> None:
    result = run("env", "--json", "missing/env.json")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: output path: got missing/env.json")


def test_the_cpu_is_described_without_touching_cuda() -> None:
    before = torch.cuda.is_initialized()
    environment = _environment.describe()
    assert torch.cuda.is_initialized() == (before or torch.cuda.is_available())
    assert environment.cores >= 1
    assert environment.cpu
    device = environment.devices[0]
    choice = batchnorm.explain_backend(torch.empty(2, 1))
    assert device.backend == choice.chosen
    assert choice.candidates[0].name in device.why


def test_a_device_that_does_not_answer_is_named_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA driver version is insufficient\nmore lines")

    monkeypatch.setattr(_environment, "_device_names", lambda: ["cpu", "cuda:0"])
    monkeypatch.setattr(torch.cuda, "get_device_name", fail)
    device = _environment.describe().devices[1]
    assert (device.name, device.backend, device.why) == ("cuda:0", "", "CUDA driver version is insufficient")
