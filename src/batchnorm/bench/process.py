"""The processes that measure: how one is started, heard out and ended, and how it gets its memory."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from batchnorm._errors import BatchNormError

__all__ = ["WorkerError", "memory_states", "work"]

# glibc takes memory above the first threshold from the system anew each time and gives it back at once, and gives
# back what lies free at the heap's end above the second. It raises both by itself up to 32 MB and documents that as the
# most for the first; measured with glibc 2.36, a block of 64 MB written again costs 16,385 page faults as it is and
# with 32 MB, and none with 1 or 4 GB. Where a libc takes less, the page faults of a result show it.
_RAISED = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(4 << 30)}

# Without -P the folder of whoever asks comes first among the places of modules, and a statistics.py of theirs with it;
# in the folder that this package lies in, it is how the package is found.
_SAFE = () if Path.cwd() == Path(__file__).resolve().parents[2] else ("-P",)


class WorkerError(BatchNormError, RuntimeError):
    """A process that measures ended before it had answered."""


def memory_states(device: str) -> tuple[str, ...]:
    """The ways in which a process can get its memory here, each worth a process of its own."""
    is_glibc = platform.libc_ver()[0] == "glibc"
    return ("as-is", "raised") if device == "cpu" and is_glibc else ("as-is",)


def work(job: Mapping[str, Any], memory: str = "as-is") -> Iterator[dict[str, Any]]:
    """Start a process for a job and yield its answers as they come; it never outlives the iteration.

    It is in a session of its own: Ctrl-C in the terminal is for the process that asks, which then ends this one.

    Raises:
        WorkerError: it ended early; the message holds its last word.
    """
    environment = {**os.environ, **(_RAISED if memory == "raised" else {})}
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [sys.executable, *_SAFE, "-m", f"{__package__}._worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env=environment,
            start_new_session=True,
        )
        assert process.stdin is not None  # for the type checker
        assert process.stdout is not None
        try:
            with process.stdin:
                process.stdin.write(json.dumps(job).encode())
            with process.stdout:
                for line in process.stdout:
                    yield json.loads(line)
            if process.wait() != 0:
                raise WorkerError(_last_word(process.returncode, complaints))
        except BrokenPipeError:
            raise WorkerError(_last_word(process.wait(), complaints)) from None
        finally:
            process.kill()
            process.wait()


def _last_word(code: int, complaints: IO[bytes]) -> str:
    complaints.seek(0)
    lines = [line.strip() for line in complaints.read().decode(errors="replace").splitlines() if line.strip()]
    if code == -9:
        return "the process was killed, probably for want of memory; a smaller --batch needs less"
    ended = f"ended by signal {-code}" if code < 0 else f"ended with {code}"
    return f"the process {ended}: {lines[-1]}" if lines else f"the process {ended}"
