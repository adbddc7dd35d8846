"""What the numbers depend on: versions, processor, threads, how fast memory is copied, who else is at work."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from batchnorm import _environment
from batchnorm.bench.statistics import median
from batchnorm.bench.timing import clock_for
from batchnorm.ops import explain_backend

__all__ = ["answer", "copy_speed", "describe"]

# Bytes of one tensor of the copy: beyond any cache. With 64 MB half of it may still lie in a cache of 32 MB; measured
# on such a machine, copies of 64 MB scatter between 31 and 43 GB/s, of 256 MB between 35 and 39.
_COPY_BYTES = {"cpu": 256_000_000, "cuda": 1_000_000_000}


def answer(job: Mapping[str, Any]) -> dict[str, Any]:
    """The header, with the backend of our layers in it, and the speed of a copy; or why the backend cannot run."""
    backend, refused = _backend(job["device"], job["dtypes"], job["backend"])
    if refused:
        return {"refused": refused}
    found = {"machine": {**describe(job["device"]), "backend": backend}}
    return {**found, "copy": copy_speed(job["device"])} if job["measure_copy"] else found


def _backend(device: str, dtypes: Sequence[str], wanted: str | None) -> tuple[str, str]:
    """What runs a training step of our layer, in words; and why the backend that is wanted cannot."""
    words = []
    for dtype in dtypes:
        choice = explain_backend(torch.empty(2, 1, device=device, dtype=getattr(torch, dtype)))
        candidates = {candidate.name: candidate for candidate in choice.candidates}
        if wanted is None:
            waiting = [
                f"{each.name} if asked for: {each.waits}"
                for each in choice.candidates
                if each.waits and each.refused is None
            ]
            words.append("; ".join([f"{choice.chosen}, the usual choice", *waiting]))
        elif candidates[wanted].refused is not None:
            return "", str(candidates[wanted].refused)
        else:
            words.append(f"{wanted}, as asked for")
    return " | ".join(dict.fromkeys(words)), ""


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
