import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from batchnorm.kernels import cpu

NAME = "batchnorm.kernels.cpu._cpu"

needs_extension = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(os.environ.get("CI") != "true", reason="only CI must have the extension")
def test_extension_is_there_under_ci() -> None:
    assert cpu.available(), cpu.why_not()


@needs_extension
def test_build_info_says_how_it_was_built() -> None:
    info = cpu.build_info()
    assert set(info) == {"compiler", "cxx_standard", "openmp", "max_threads"}
    assert re.fullmatch(r"(gcc|clang) \d+\.\d+\.\d+|msvc \d+", str(info["compiler"]))
    assert int(info["cxx_standard"]) >= 201703
    assert cpu.why_not() == ""


@needs_extension
@pytest.mark.usefixtures("_threads")
@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere torch and the compiler bring two OpenMP runtimes"
)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_extension_obeys_the_threads_of_torch(threads: int) -> None:
    extension = importlib.import_module(NAME)
    torch.set_num_threads(threads)
    assert cpu.build_info()["openmp"]
    assert cpu.build_info()["max_threads"] == threads
    assert extension.team_size() == threads


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_extension_brings_no_second_openmp_runtime() -> None:
    # In a process of its own: other libraries, scikit-learn for one, bring a runtime that is theirs.
    code = """
import pathlib, re
from batchnorm.kernels import cpu
assert cpu.available(), cpu.why_not()
lines = pathlib.Path("/proc/self/maps").read_text().splitlines()
print(*{line.split()[-1] for line in lines if re.search(r"/lib[gi]?omp[^/]*[.]so", line)}, sep="\\n")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    (runtime,) = result.stdout.splitlines()
    assert Path(runtime).is_relative_to(Path(torch.__file__).parent)


@pytest.fixture
def _reloaded() -> Iterator[None]:
    yield
    importlib.reload(cpu)


@pytest.mark.usefixtures("_reloaded")
def test_missing_extension_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", absent)
        module = importlib.reload(cpu)
    assert not module.available()
    assert module.build_info() == {}
    assert "is not installed" in module.why_not()
    assert "apt-get install g++" in module.why_not()


@pytest.mark.usefixtures("_reloaded")
def test_broken_extension_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libgomp.so.1: cannot open shared object file")

    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", broken)
        module = importlib.reload(cpu)
    assert not module.available()
    assert "does not load: libgomp.so.1" in module.why_not()
