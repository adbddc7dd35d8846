"""`batchnorm.check` and its rules, and `batchnorm.watch`, which lets them look on while a network trains."""

from batchnorm.checks._check import check as check
from batchnorm.checks.finding import Finding as Finding
from batchnorm.checks.findings import Findings as Findings
from batchnorm.checks.live import Watcher as Watcher
from batchnorm.checks.live import watch as watch

__all__ = ["Finding", "Findings", "Watcher", "check", "watch"]
