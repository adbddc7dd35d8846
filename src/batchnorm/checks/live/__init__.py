"""`watch`: batch norm seen while a network trains."""

from batchnorm.checks.live.watcher import Watcher as Watcher
from batchnorm.checks.live.watching import watch as watch

__all__ = ["Watcher", "watch"]
