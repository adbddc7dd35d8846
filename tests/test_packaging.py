"""The wheel that users install: what is in it, and that it works where nothing of the project lies."""

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import batchnorm

ROOT = Path(__file__).resolve().parents[1]

# Compiling takes two to three minutes on two cores, and longer beside other tests.
BUILD_SECONDS = 1200

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("packaging"),
    pytest.mark.timeout(2 * BUILD_SECONDS),
]


def build(folder: Path, project: Path = ROOT, **environment: str) -> Path:
    """A wheel, made by the tools of this environment, in build folders of its own."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    settings = [
        "--config-settings",
        f"build-dir={folder / 'build'}",
        "--wheel-dir",
        str(folder),
        str(project),
    ]
    result = subprocess.run(
        command + settings,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=BUILD_SECONDS,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("batchnorm-*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


def python_beside_torch(folder: Path, wheel: Path) -> Path:
    """A Python that has the wheel, and this environment's packages but not its editable install."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    python = folder / "bin" / "python"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "-q",
            "--no-deps",
            "--no-index",
            str(wheel),
        ],
        check=True,
        timeout=120,
    )
    # A folder that a .pth file names is searched, but the .pth files in it are not run: an editable
    # install hooks in by one of those.
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    return python


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {
        str(file.relative_to(ROOT / "src"))
        for file in (ROOT / "src").rglob("*")
        if file.is_file() and "csrc" not in file.parts and "__pycache__" not in file.parts
    }
    compiled = {name for name in names if re.fullmatch(r"batchnorm/kernels/cpu/_cpu\..*(so|pyd)", name)}
    assert {"batchnorm/py.typed", "batchnorm/kernels/cpu/_cpu.pyi"} <= names
    assert len(compiled) == 1
    assert {name for name in names if ".dist-info/" not in name} == sources | compiled


def test_metadata_says_what_the_package_says(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Version"] == batchnorm.__version__
    assert metadata["License-Expression"] == "MIT"
    core = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(re.split(r"[<>=!~ ]", line)[0] for line in core) == ["numpy", "torch"]


def test_installed_wheel_works(wheel: Path, tmp_path: Path) -> None:
    python = python_beside_torch(tmp_path / "env", wheel)
    code = """
import pathlib, sys, batchnorm, torch
from batchnorm.kernels import cpu
assert pathlib.Path(batchnorm.__file__).is_relative_to(sys.prefix), batchnorm.__file__
assert cpu.available(), cpu.why_not()
assert cpu.build_info()["openmp"]
y = batchnorm.BatchNorm1d(3)(torch.randn(64, 3) * 5 + 7)
assert y.mean(0).abs().max() < 1e-5, y.mean(0)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, "-c", code], check=True, cwd=tmp_path, env=environment, timeout=120)
    script = python.with_name("batchnorm")
    result = subprocess.run(
        [script, "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=environment,
        timeout=60,
    )
    assert "compare" in result.stdout


def test_installs_without_a_compiler(tmp_path: Path) -> None:
    wheel = build(tmp_path, CXX=str(tmp_path / "no-such-compiler"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "batchnorm/nn/__init__.py" in names
    assert not [name for name in names if name.endswith((".so", ".pyd"))]


def test_a_compile_error_is_an_error(tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(ROOT / "src", project / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    source = project / "src/batchnorm/kernels/cpu/csrc/module.cpp"
    source.write_text(source.read_text("utf-8") + '\nstatic_assert(false, "broken on purpose");\n', "utf-8")
    with pytest.raises(AssertionError, match="broken on purpose"):
        build(tmp_path, project)


def test_constraints_pin_every_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    extras = project["project"]["optional-dependencies"].values()
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    wanted += [line for extra in extras for line in extra]
    names = {re.split(r"[\[<>=!~; ]", line)[0] for line in wanted} - {"batchnorm"}
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {line.split("==")[0] for line in lines if "==" in line}

    def key(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    assert {key(name) for name in names} <= {key(name) for name in pinned}
