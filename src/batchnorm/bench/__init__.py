"""Layers, the host's time for them, and whole training steps, timed against PyTorch's: `measure` and its kin."""

from batchnorm.bench._measure import measure as measure
from batchnorm.bench.distributed import measure_distributed as measure_distributed
from batchnorm.bench.host_times import HostTimes as HostTimes
from batchnorm.bench.hosting import measure_host as measure_host
from batchnorm.bench.progress import Progress as Progress
from batchnorm.bench.progress import Silent as Silent
from batchnorm.bench.result import Benchmark as Benchmark
from batchnorm.bench.synchronization import Synchronization as Synchronization
from batchnorm.bench.training import measure_steps as measure_steps
from batchnorm.bench.training_steps import TrainingSteps as TrainingSteps

__all__ = [
    "Benchmark",
    "HostTimes",
    "Progress",
    "Silent",
    "Synchronization",
    "TrainingSteps",
    "measure",
    "measure_distributed",
    "measure_host",
    "measure_steps",
]
