"""The layers timed against PyTorch's on real networks' shapes, and both checked against float64: `measure`."""

from batchnorm.bench._measure import measure as measure
from batchnorm.bench.distributed import measure_distributed as measure_distributed
from batchnorm.bench.progress import Progress as Progress
from batchnorm.bench.progress import Silent as Silent
from batchnorm.bench.result import Benchmark as Benchmark
from batchnorm.bench.synchronization import Synchronization as Synchronization

__all__ = ["Benchmark", "Progress", "Silent", "Synchronization", "measure", "measure_distributed"]
