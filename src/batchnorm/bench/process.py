"""The processes that measure: how one is started, heard out and ended, and how it gets its memory."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from batchnorm._errors import BatchNormError

__all__ = ["WorkerError", "memory_states", "work", "work_together"]

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
    return work_together([job], memory)


def work_together(jobs: Sequence[Mapping[str, Any]], memory: str = "as-is") -> Iterator[dict[str, Any]]:
    """Start a process for each job, all at once, and yield the answers of the first; as `work` does for one.

    Raises:
        WorkerError: one of them ended early; the message holds its last word.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(_started(memory)) for _ in jobs]
        try:
            for worker, job in zip(workers, jobs, strict=True):
                worker.tell(job)
            yield from workers[0].answers()
        except BrokenPipeError:
            pass
        words = [word for worker in workers if (word := worker.last_word())]
        # When one ends early, the others miss it, and then speak of its connection and not of what was wrong.
        causes = [word for word in words if "onnection" not in word]
        if words:
            raise WorkerError((causes or words)[0])


class _Worker:
    """A process that works on a job."""

    def __init__(self, process: subprocess.Popen[bytes], complaints: IO[bytes]) -> None:
        self.process = process
        self.complaints = complaints

    def tell(self, job: Mapping[str, Any]) -> None:
        """What to do."""
        assert self.process.stdin is not None  # for the type checker
        with self.process.stdin:
            self.process.stdin.write(json.dumps(job).encode())

    def answers(self) -> Iterator[dict[str, Any]]:
        """What it finds, until it ends."""
        assert self.process.stdout is not None  # for the type checker
        for line in self.process.stdout:
            yield json.loads(line)

    def last_word(self) -> str:
        """Wait for its end, and say how it was; empty for a good one."""
        code = self.process.wait()
        return "" if code == 0 else _last_word(code, self.complaints)


@contextmanager
def _started(memory: str) -> Iterator[_Worker]:
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
        try:
            yield _Worker(process, complaints)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):
                    assert pipe is not None  # for the type checker
                    pipe.close()


def _last_word(code: int, complaints: IO[bytes]) -> str:
    complaints.seek(0)
    lines = [line.strip() for line in complaints.read().decode(errors="replace").splitlines() if line.strip()]
    if code == -9:
        return "the process was killed, probably for want of memory; a smaller --batch needs less"
    ended = f"ended by signal {-code}" if code < 0 else f"ended with {code}"
    return f"the process {ended}: {lines[-1]}" if lines else f"the process {ended}"
