"""Batch-norm layers: drop-in subclasses of PyTorch's."""

from batchnorm.nn.batch_norm import BatchNorm1d as BatchNorm1d
from batchnorm.nn.batch_norm import BatchNorm2d as BatchNorm2d
from batchnorm.nn.batch_norm import BatchNorm3d as BatchNorm3d
from batchnorm.nn.conditional import ConditionalBatchNorm as ConditionalBatchNorm
from batchnorm.nn.conditional import condition as condition
from batchnorm.nn.domains import DomainBatchNorm as DomainBatchNorm
from batchnorm.nn.domains import domain as domain
from batchnorm.nn.frozen import FrozenBatchNorm as FrozenBatchNorm
from batchnorm.nn.ghost import GhostBatchNorm as GhostBatchNorm
from batchnorm.nn.lazy import LazyBatchNorm1d as LazyBatchNorm1d
from batchnorm.nn.lazy import LazyBatchNorm2d as LazyBatchNorm2d
from batchnorm.nn.lazy import LazyBatchNorm3d as LazyBatchNorm3d
from batchnorm.nn.renorm import BatchRenorm as BatchRenorm
from batchnorm.nn.sync import SyncBatchNorm as SyncBatchNorm
from batchnorm.nn.sync_check import check_sync as check_sync
from batchnorm.nn.virtual import VirtualBatchNorm as VirtualBatchNorm
from batchnorm.nn.virtual import reference_batch as reference_batch
from batchnorm.nn.whitened import WhitenedBatchNorm as WhitenedBatchNorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
    "ConditionalBatchNorm",
    "DomainBatchNorm",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "SyncBatchNorm",
    "VirtualBatchNorm",
    "WhitenedBatchNorm",
    "check_sync",
    "condition",
    "domain",
    "reference_batch",
]
