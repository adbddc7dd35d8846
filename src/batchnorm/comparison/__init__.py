"""The same network with and without batch norm, on the same data, side by side: `compare`."""

from batchnorm.comparison._compare import compare as compare
from batchnorm.comparison.data import Data as Data
from batchnorm.comparison.progress import Progress as Progress
from batchnorm.comparison.progress import Silent as Silent
from batchnorm.comparison.result import Comparison as Comparison

__all__ = ["Comparison", "Data", "Progress", "Silent", "compare"]
