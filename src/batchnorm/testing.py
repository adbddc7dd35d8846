"""For test suites of one's own: assertions about models with batch norm."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from batchnorm._errors import InputError, message
from batchnorm.checks import check
from batchnorm.checks._words import count
from batchnorm.checks.finding import SEVERITIES, Severity
from batchnorm.checks.telling import told

__all__ = ["assert_healthy"]


def assert_healthy(
    model: nn.Module | Mapping[str, Any],
    *,
    batches: Iterable[Any] | None = None,
    severity: Severity = "warning",
    ignore: Iterable[str] | str | None = None,
    **options: Any,
) -> None:
    """Fail a test if `batchnorm.check` finds something in the model.

    For a project's own tests: that the model which is trained, or the checkpoint which is shipped, has none of the
    known mistakes of batch norm. The model is afterwards as it was.

    Wrong to use where a single finding is meant: `batchnorm.check(model, select="BN101")` returns it. A model without
    batch norm passes.

    Args:
        model: any module, or a state dict.
        batches: a DataLoader or another iterable of batches, as `check` takes it. Without them the rules BN101 to BN113
            do not run.
        severity: the least severity that fails: "error", "warning", or "info", which healthy models have, too.
        ignore: codes, or beginnings of codes, of rules to leave out.
        options: what else `check` takes: `optimizer`, `averaged`, `world_size`, `select`, `forward`, `max_batches`.

    Raises:
        AssertionError: there is such a finding. Its text has every one of them: layer, what was seen, why, and the fix.
        InputError: an unknown severity or rule.
        InputTypeError, DataError, ModelError: as `check` raises them.

    Example:
        >>> import torch
        >>> from batchnorm.testing import assert_healthy
        >>> assert_healthy(torch.nn.BatchNorm1d(4))
        >>> assert_healthy(torch.nn.BatchNorm1d(4, momentum=0.9))
        Traceback (most recent call last):
        ...
        AssertionError: 1 finding in 1 batch norm
        model: BN004 warning: momentum is 0.9: each batch replaces 90 % of the running statistics
          why: in PyTorch momentum is the weight of the new batch, elsewhere that of the old average
          fix (safe, by findings.fix(); recalibrate is left to you): layer.momentum = 0.1, then ...
    """
    __tracebackhide__ = True  # pytest then shows the line of the test
    if severity not in SEVERITIES:
        raise InputError(
            message(
                "assert_healthy: severity", got=repr(severity), expected=f"one of {', '.join(SEVERITIES)}"
            )
        )
    findings = check(model, batches=batches, ignore=ignore, **options)
    found = findings.at_least(severity)
    if found:
        counted = f"{count(len(found), 'finding')} in {count(findings.layers, 'batch norm')}"
        raise AssertionError("\n".join([counted, *(told(each) for each in found)]))
