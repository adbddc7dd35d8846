"""Tools for the running statistics of batch norm."""

from batchnorm.stats._recalibrate import recalibrate
from batchnorm.stats._recalibration import RecalibratedLayer, Recalibration

__all__ = ["RecalibratedLayer", "Recalibration", "recalibrate"]
