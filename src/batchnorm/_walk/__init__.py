"""The one tree walker, and `Changes`: what an operation did to a model and how to take it back."""

from batchnorm._walk.changes import Change, Changes, Skipped, html_table
from batchnorm._walk.plan import Plan
from batchnorm._walk.short import short
from batchnorm._walk.tree import Spot, copied, hooks_of, prepared, walk

__all__ = [
    "Change",
    "Changes",
    "Plan",
    "Skipped",
    "Spot",
    "copied",
    "hooks_of",
    "html_table",
    "prepared",
    "short",
    "walk",
]
