"""Tools for the running statistics of batch norm."""

from batchnorm.stats._accumulate import Accumulation, accumulate
from batchnorm.stats._adapt import Adapted, adapt
from batchnorm.stats._averaged import Averaged, averaged
from batchnorm.stats._frameworks import Translation, from_framework, to_framework
from batchnorm.stats._groups import parameter_groups
from batchnorm.stats._merge import merge_statistics
from batchnorm.stats._recalibrate import recalibrate
from batchnorm.stats._recalibration import RecalibratedLayer, Recalibration

__all__ = [
    "Accumulation",
    "Adapted",
    "Averaged",
    "RecalibratedLayer",
    "Recalibration",
    "Translation",
    "accumulate",
    "adapt",
    "averaged",
    "from_framework",
    "merge_statistics",
    "parameter_groups",
    "recalibrate",
    "to_framework",
]
