"""Layers of the real Keras, Flax, Haiku and Equinox, carried over and back; the checks are in `framework_worker.py`."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("framework_worker.py")
NEEDED = {
    "keras": ("keras",),
    "flax": ("flax", "jax"),
    "haiku": ("haiku", "jax"),
    "equinox": ("equinox", "jax"),
}


@pytest.mark.packages
@pytest.mark.parametrize("name", NEEDED)
def test_trained_there_used_here_and_the_reverse(name: str, tmp_path: Path) -> None:
    missing = [package for package in NEEDED[name] if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed: pip install --no-deps -r tests/no-deps.txt")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "KERAS_BACKEND": "torch",
        "KERAS_HOME": str(tmp_path),  # where it writes its settings
        "JAX_PLATFORMS": "cpu",
    }
    child = subprocess.run(
        [sys.executable, str(WORKER), name],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert child.returncode == 0, child.stderr
