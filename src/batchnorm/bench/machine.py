"""What the numbers depend on: versions, processor, threads, how fast memory is copied, who else is at work."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from batchnorm import _environment
from batchnorm.bench.statistics import median
from batchnorm.bench.timing import clock_for

__all__ = ["copy_speed", "describe"]

# Bytes of one tensor of the copy: beyond any cache. With 64 MB half of it may still lie in a cache of 32 MB; measured
# on such a machine, copies of 64 MB scatter between 31 and 43 GB/s, of 256 MB between 35 and 39.
_COPY_BYTES = {"cpu": 256_000_000, "cuda": 1_000_000_000}


def describe(device: str) -> dict[str, Any]:
    """The header of a benchmark, as plain data."""
    found = _environment.describe()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "batchnorm": found.batchnorm,
        "commit": _commit(),
        "torch": found.torch,
        "python": found.python,
        "system": found.system,
        "libc": " ".join(platform.libc_ver()).strip(),
        "cpu": found.cpu,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else found.cpu,
        "cores": found.cores,
        "threads": torch.get_num_threads(),
        "huge_pages": _huge_pages(),
        "load": load,
        "kernels": found.extension,
    }


def copy_speed(device: str) -> float:
    """Bytes a second, read and written, of copies between two tensors that are there already."""
    source = torch.ones(_COPY_BYTES[torch.device(device).type] // 4, device=device)
    target = torch.zeros_like(source)
    clock = clock_for(device)
    times = [clock.sample(lambda: target.copy_(source), 1) for _ in range(15)]
    return 2 * source.numel() * source.element_size() / median(times)


def _commit() -> str:
    """The checkout that this file belongs to; empty for an installed package."""
    folder = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
        tracked = subprocess.run(
            ["git", "ls-files", "--error-unmatch", Path(__file__).name],
            cwd=folder,
            capture_output=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    # A virtual environment may lie in some other project's checkout.
    return answer.stdout.strip() if answer.returncode == tracked.returncode == 0 else ""


def _huge_pages() -> str:
    """The kernel's setting of transparent huge pages, which decides what new memory costs; empty if unknown."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    try:
        text = setting.read_text(encoding="ascii")
    except OSError:
        return ""
    return text.partition("[")[2].partition("]")[0]
