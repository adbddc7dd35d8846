"""`batchnorm.check` and its rules."""

from batchnorm.checks._check import check as check
from batchnorm.checks.finding import Finding as Finding
from batchnorm.checks.findings import Findings as Findings

__all__ = ["Finding", "Findings", "check"]
