"""The kernels as the compilers see them: for GPUs that need not be there.

The interpreter runs what a compiler would refuse: a variable that changes its type in a loop, for one.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


@pytest.mark.parametrize(
    ("backend", "architecture", "all_of_them"),
    [("cuda", "90", True), ("cuda", "75", False), ("hip", "gfx942", False)],
)
def test_every_kernel_compiles(backend: str, architecture: str, all_of_them: bool, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [
            sys.executable,
            str(TESTS / "triton_compile.py"),
            backend,
            architecture,
            *(["all"] if all_of_them else []),
        ],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line.split() for line in result.stdout.splitlines()]
    kernels = {"_moments_kernel", "_normalize_kernel", "_grad_sums_kernel", "_grad_input_kernel"}
    assert {name for name, *_ in lines} == kernels | ({"_running_kernel"} if all_of_them else set())
    assert all(int(shared) < 48_000 for _, _, shared in lines)
