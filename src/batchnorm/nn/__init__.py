"""Batch-norm layers: drop-in subclasses of PyTorch's."""

from batchnorm.nn.batch_norm import BatchNorm1d as BatchNorm1d
from batchnorm.nn.batch_norm import BatchNorm2d as BatchNorm2d
from batchnorm.nn.batch_norm import BatchNorm3d as BatchNorm3d
from batchnorm.nn.lazy import LazyBatchNorm1d as LazyBatchNorm1d
from batchnorm.nn.lazy import LazyBatchNorm2d as LazyBatchNorm2d
from batchnorm.nn.lazy import LazyBatchNorm3d as LazyBatchNorm3d
from batchnorm.nn.sync import SyncBatchNorm as SyncBatchNorm
from batchnorm.nn.sync_check import check_sync as check_sync

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "SyncBatchNorm",
    "check_sync",
]
