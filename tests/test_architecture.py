"""What holds for the package as a whole; `lint-imports` checks which layer may import which."""

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(batchnorm.__file__).resolve().parent

PUBLIC = [
    "Accumulation",
    "Adapted",
    "Averaged",
    "BackendError",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormError",
    "BatchRenorm",
    "Changes",
    "Comparison",
    "ConditionalBatchNorm",
    "DataError",
    "DomainBatchNorm",
    "Finding",
    "Findings",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "InputError",
    "InputTypeError",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "MissingDependencyError",
    "ModelError",
    "OutputError",
    "RecalibratedLayer",
    "Recalibration",
    "SyncBatchNorm",
    "Trace",
    "Translation",
    "VirtualBatchNorm",
    "Watcher",
    "WhitenedBatchNorm",
    "__version__",
    "absorb_bias",
    "accumulate",
    "adapt",
    "averaged",
    "batch_norm",
    "check",
    "check_sync",
    "compare",
    "condition",
    "convert",
    "domain",
    "explain_backend",
    "fold",
    "freeze",
    "from_framework",
    "fuse",
    "insert",
    "merge_statistics",
    "parameter_groups",
    "recalibrate",
    "reference_batch",
    "remove",
    "to_framework",
    "trace",
    "unfreeze",
    "watch",
]


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process that has imported nothing yet; what it asserts, the test asserts."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_public_names_are_these_and_no_others() -> None:
    assert sorted(batchnorm.__all__) == PUBLIC
    assert len(batchnorm.__all__) == len(set(batchnorm.__all__))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_resolves_and_is_listed(name: str) -> None:
    assert getattr(batchnorm, name) is not None
    assert name in dir(batchnorm)


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "__version__"])
def test_public_name_is_documented(name: str) -> None:
    assert getattr(batchnorm, name).__doc__
    pages = [page.read_text("utf-8").splitlines() for page in (ROOT / "docs/api").glob("*.md")]
    assert sum(f"::: batchnorm.{name}" in page for page in pages) == 1


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'batchnorm' has no attribute 'BatchNorm4d'"):
        _ = batchnorm.BatchNorm4d


def test_no_public_name_is_a_submodule() -> None:
    # Importing batchnorm.x sets the attribute x of the package, over a function of that name.
    submodules = {module.name for module in pkgutil.iter_modules([str(PACKAGE)])}
    assert {"nn", "ops"} <= submodules
    assert not submodules & set(batchnorm.__all__)


def test_import_leaves_torch_alone() -> None:
    result = run("import sys, batchnorm; batchnorm.__version__; print('torch' in sys.modules)")
    assert (result.stdout, result.stderr) == ("False\n", "")


def test_only_the_kernels_for_gpus_import_triton_and_only_when_they_run() -> None:
    for file in PACKAGE.rglob("*.py"):
        imports = re.findall(r"^\s*(?:import|from) triton\b", file.read_text("utf-8"), re.MULTILINE)
        assert not imports or file.parent.name == "triton", file
    code = """
import sys, torch, batchnorm
x = torch.randn(4, 3, requires_grad=True)
batchnorm.batch_norm(x, None, None, training=True).sum().backward()
batchnorm.explain_backend(x)
print('triton' in sys.modules)
"""
    assert run(code).stdout == "False\n"


def test_the_process_that_asks_for_a_benchmark_leaves_torch_alone() -> None:
    result = run("import sys, batchnorm.bench; print('torch' in sys.modules)")
    assert (result.stdout, result.stderr) == ("False\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["bench", "--help"],
        ["check", "--help"],
        ["compare", "--help"],
        ["env", "--help"],
        ["explain", "--help"],
        ["recalibrate", "--help"],
        ["fold", "--help"],
        ["rules", "--help"],
    ],
    ids=" ".join,
)
def test_help_leaves_torch_alone(arguments: list[str]) -> None:
    code = """
import sys
from batchnorm.cli import main
sys.argv[0] = "batchnorm"
try:
    code = main()
except SystemExit as stop:
    code = stop.code
assert not code, code
heavy = {"torch", "numpy", "plotly", "sklearn", "jinja2"} & set(sys.modules)
assert not heavy, heavy
"""
    result = run(code, *arguments)
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout


def test_no_file_is_long() -> None:
    files = [file for part in ("src", "tests", "benchmarks") for file in (ROOT / part).rglob("*.py")]
    assert len(files) > 10
    lengths = {str(file.relative_to(ROOT)): len(file.read_text("utf-8").splitlines()) for file in files}
    assert not {name: length for name, length in lengths.items() if length > 450}
