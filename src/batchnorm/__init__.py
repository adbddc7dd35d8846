"""Batch normalization for PyTorch: exact layers, and tools that show what they do to a network."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public name -> the module that defines it. Nothing is imported before it is used, so that
# `import batchnorm` costs nothing and the command line answers `--help` without importing torch.
_HOME = {
    "Accumulation": "stats",
    "Adapted": "stats",
    "Averaged": "stats",
    "BackendError": "_errors",
    "BatchNorm1d": "nn",
    "BatchNorm2d": "nn",
    "BatchNorm3d": "nn",
    "BatchNormError": "_errors",
    "BatchRenorm": "nn",
    "Changes": "_walk",
    "Comparison": "comparison",
    "ConditionalBatchNorm": "nn",
    "DataError": "_errors",
    "DomainBatchNorm": "nn",
    "Finding": "checks",
    "Findings": "checks",
    "FrozenBatchNorm": "nn",
    "GhostBatchNorm": "nn",
    "InputError": "_errors",
    "InputTypeError": "_errors",
    "LazyBatchNorm1d": "nn",
    "LazyBatchNorm2d": "nn",
    "LazyBatchNorm3d": "nn",
    "MissingDependencyError": "_errors",
    "ModelError": "_errors",
    "OutputError": "_errors",
    "RecalibratedLayer": "stats",
    "Recalibration": "stats",
    "SyncBatchNorm": "nn",
    "Trace": "explain",
    "Translation": "stats",
    "VirtualBatchNorm": "nn",
    "Watcher": "checks",
    "WhitenedBatchNorm": "nn",
    "absorb_bias": "surgery",
    "accumulate": "stats",
    "adapt": "stats",
    "averaged": "stats",
    "batch_norm": "functional",
    "check": "checks",
    "check_sync": "nn",
    "compare": "comparison",
    "condition": "nn",
    "convert": "surgery",
    "domain": "nn",
    "explain_backend": "ops",
    "fold": "surgery",
    "freeze": "surgery",
    "from_framework": "stats",
    "fuse": "surgery",
    "insert": "surgery",
    "merge_statistics": "stats",
    "parameter_groups": "stats",
    "recalibrate": "stats",
    "reference_batch": "nn",
    "remove": "surgery",
    "to_framework": "stats",
    "trace": "explain",
    "unfreeze": "surgery",
    "watch": "checks",
}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604 - the dictionary's keys are strings

if TYPE_CHECKING:
    from batchnorm._errors import BackendError as BackendError
    from batchnorm._errors import BatchNormError as BatchNormError
    from batchnorm._errors import DataError as DataError
    from batchnorm._errors import InputError as InputError
    from batchnorm._errors import InputTypeError as InputTypeError
    from batchnorm._errors import MissingDependencyError as MissingDependencyError
    from batchnorm._errors import ModelError as ModelError
    from batchnorm._errors import OutputError as OutputError
    from batchnorm._walk import Changes as Changes
    from batchnorm.checks import Finding as Finding
    from batchnorm.checks import Findings as Findings
    from batchnorm.checks import Watcher as Watcher
    from batchnorm.checks import check as check
    from batchnorm.checks import watch as watch
    from batchnorm.comparison import Comparison as Comparison
    from batchnorm.comparison import compare as compare
    from batchnorm.explain import Trace as Trace
    from batchnorm.explain import trace as trace
    from batchnorm.functional import batch_norm as batch_norm
    from batchnorm.nn import BatchNorm1d as BatchNorm1d
    from batchnorm.nn import BatchNorm2d as BatchNorm2d
    from batchnorm.nn import BatchNorm3d as BatchNorm3d
    from batchnorm.nn import BatchRenorm as BatchRenorm
    from batchnorm.nn import ConditionalBatchNorm as ConditionalBatchNorm
    from batchnorm.nn import DomainBatchNorm as DomainBatchNorm
    from batchnorm.nn import FrozenBatchNorm as FrozenBatchNorm
    from batchnorm.nn import GhostBatchNorm as GhostBatchNorm
    from batchnorm.nn import LazyBatchNorm1d as LazyBatchNorm1d
    from batchnorm.nn import LazyBatchNorm2d as LazyBatchNorm2d
    from batchnorm.nn import LazyBatchNorm3d as LazyBatchNorm3d
    from batchnorm.nn import SyncBatchNorm as SyncBatchNorm
    from batchnorm.nn import VirtualBatchNorm as VirtualBatchNorm
    from batchnorm.nn import WhitenedBatchNorm as WhitenedBatchNorm
    from batchnorm.nn import check_sync as check_sync
    from batchnorm.nn import condition as condition
    from batchnorm.nn import domain as domain
    from batchnorm.nn import reference_batch as reference_batch
    from batchnorm.ops import explain_backend as explain_backend
    from batchnorm.stats import Accumulation as Accumulation
    from batchnorm.stats import Adapted as Adapted
    from batchnorm.stats import Averaged as Averaged
    from batchnorm.stats import RecalibratedLayer as RecalibratedLayer
    from batchnorm.stats import Recalibration as Recalibration
    from batchnorm.stats import Translation as Translation
    from batchnorm.stats import accumulate as accumulate
    from batchnorm.stats import adapt as adapt
    from batchnorm.stats import averaged as averaged
    from batchnorm.stats import from_framework as from_framework
    from batchnorm.stats import merge_statistics as merge_statistics
    from batchnorm.stats import parameter_groups as parameter_groups
    from batchnorm.stats import recalibrate as recalibrate
    from batchnorm.stats import to_framework as to_framework
    from batchnorm.surgery import absorb_bias as absorb_bias
    from batchnorm.surgery import convert as convert
    from batchnorm.surgery import fold as fold
    from batchnorm.surgery import freeze as freeze
    from batchnorm.surgery import fuse as fuse
    from batchnorm.surgery import insert as insert
    from batchnorm.surgery import remove as remove
    from batchnorm.surgery import unfreeze as unfreeze


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'batchnorm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"batchnorm.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
