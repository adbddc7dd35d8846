"""Batch norm in four steps, on numbers of one's own (`trace`) and as a story one can play with."""

from batchnorm.explain._trace import Trace as Trace
from batchnorm.explain._trace import trace as trace

__all__ = ["Trace", "trace"]
