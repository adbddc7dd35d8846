"""Time several functions in turn, so that whatever else the machine does meets all of them."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from batchnorm.bench.record import Timing
from batchnorm.bench.statistics import median, percentile

__all__ = [
    "Clock",
    "CpuClock",
    "CudaClock",
    "HostClock",
    "calls_and_samples",
    "clock_for",
    "interleaved",
    "timing_of",
]

# A sample lasts at least this long, so that the clock's own cost does not count.
SAMPLE_SECONDS = 1e-3
# A round of one contender, as long as that allows more than one sample; and where a call turns out to take far longer
# than at first, as it does on a busy machine, the round ends after three times that.
ROUND_SECONDS = 0.03
PATIENCE_SECONDS = 3 * ROUND_SECONDS
MAX_SAMPLES = 12


class Clock(Protocol):
    """How a device's time is taken."""

    def ready(self, function: Callable[[], object]) -> Callable[[], object]:
        """The function as it is timed."""

    def sample(self, function: Callable[[], object], calls: int) -> float:
        """Seconds per call over a number of calls."""

    def faults(self) -> int | None:
        """Pages mapped since the process began."""

    def replayed(self, function: Callable[[], object]) -> bool | None:
        """Whether a function that is ready replays a CUDA graph; None where there are none."""


class CpuClock:
    """Wall clock."""

    def ready(self, function: Callable[[], object]) -> Callable[[], object]:
        """The function itself."""
        return function

    def sample(self, function: Callable[[], object], calls: int) -> float:
        """Seconds per call."""
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls

    def faults(self) -> int | None:
        """Minor page faults; Windows has no such count."""
        try:
            import resource
        except ImportError:
            return None
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def replayed(self, function: Callable[[], object]) -> bool | None:
        """The CPU has no graphs."""
        return None


class HostClock(CpuClock):
    """The host's time to launch a function's work, whether or not the device has done it yet."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def sample(self, function: Callable[[], object], calls: int) -> float:
        """Seconds per call, the device idle before the first one."""
        self._wait()
        seconds = super().sample(function, calls)
        self._wait()
        return seconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class CudaClock:
    """Events on the device, around replays of a CUDA graph: the time of the kernels without that of the host."""

    def __init__(self) -> None:
        self._plain: list[Callable[[], object]] = []

    def ready(self, function: Callable[[], object]) -> Callable[[], object]:
        """The function captured as a graph, or itself where that cannot be done."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                function()
        except RuntimeError:
            torch.cuda.synchronize()
            self._plain.append(function)
            return function
        replay: Callable[[], object] = graph.replay
        return replay

    def sample(self, function: Callable[[], object], calls: int) -> float:
        """Seconds per call between two events."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3 / calls

    def faults(self) -> int | None:
        """The device's memory comes from PyTorch's cache."""
        return None

    def replayed(self, function: Callable[[], object]) -> bool | None:
        """Whether it could be captured."""
        return function not in self._plain


def clock_for(device: str) -> Clock:
    """The clock of a device."""
    return CudaClock() if torch.device(device).type == "cuda" else CpuClock()


def interleaved(
    functions: Mapping[str, Callable[[], object]], clock: Clock, rounds: int
) -> dict[str, Timing]:
    """Time each function for a while, in turn, `rounds` times.

    A round begins with a call that is not timed, and every other round goes through the functions backwards, so that
    none always profits from what another left in the caches.
    """
    functions = {name: clock.ready(function) for name, function in functions.items()}
    pace = {name: _pace(function, clock) for name, function in functions.items()}
    samples: dict[str, list[list[float]]] = {name: [] for name in functions}
    faults: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds):
        for name in list(functions)[:: -1 if number % 2 else 1]:
            function = functions[name]
            calls, count = calls_and_samples(pace[name])
            function()
            before = clock.faults()
            taken = _round(function, clock, calls, count)
            after = clock.faults()
            samples[name].append(taken)
            if before is not None and after is not None:
                faults[name].append((after - before) / (len(taken) * calls))
    return {
        name: replace(timing_of(samples[name], faults[name]), replayed=clock.replayed(function))
        for name, function in functions.items()
    }


def calls_and_samples(pace: float) -> tuple[int, int]:
    """How many calls of so many seconds make a sample, and how many samples a round."""
    calls = max(1, math.ceil(SAMPLE_SECONDS / pace))
    return calls, min(max(round(ROUND_SECONDS / (pace * calls)), 1), MAX_SAMPLES)


def _round(function: Callable[[], object], clock: Clock, calls: int, count: int) -> list[float]:
    """At least one sample, and more for as long as a round lasts."""
    taken = [clock.sample(function, calls)]
    while len(taken) < count and sum(taken) * calls < PATIENCE_SECONDS:
        taken.append(clock.sample(function, calls))
    return taken


def _pace(function: Callable[[], Any], clock: Clock) -> float:
    """About how long a call takes, once it is warm."""
    clock.sample(function, 2)
    return max(clock.sample(function, 2), 1e-9)


def timing_of(samples: Sequence[Sequence[float]], faults: Sequence[float]) -> Timing:
    """Percentiles of the samples, round by round."""
    every = [value for part in samples for value in part]
    p20, p50, p80 = (percentile(every, share) for share in (0.2, 0.5, 0.8))
    return Timing(p20, p50, p80, tuple(median(part) for part in samples), median(faults) if faults else None)
