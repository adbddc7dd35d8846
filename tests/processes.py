"""Processes on gloo for the distributed tests, none of them the test runner's own where there are several.

In a process that has compiled something, gloo's threads hold Python objects for a moment after each collective, and
destroying the process group then waits for ever: for a thread that waits for the interpreter's lock, which the
destroyer holds.
"""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch.distributed as dist

__all__ = ["alone", "load", "together"]


def load(worker: Path) -> ModuleType:
    """The worker's file as a module, for what the test shares with it."""
    spec = importlib.util.spec_from_file_location(worker.stem, worker)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def together(worker: Path, processes: int, *arguments: str, timeout: float = 100) -> None:
    """Run `python worker RANK *arguments` for every rank; fail with what the first broken one wrote."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(worker), str(rank), *arguments],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        errors = [child.communicate(timeout=timeout)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    for rank, (child, written) in enumerate(zip(children, errors, strict=True)):
        assert child.returncode == 0, f"rank {rank}: {written}"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", f"file://{folder / 'rendezvous'}", rank=0, world_size=1)
    try:
        yield
    finally:
        time.sleep(0.2)  # gloo's threads let go of what they hold
        dist.destroy_process_group()
