"""Running statistics moved several times for each step of the optimizer: gradients are accumulated.

Accumulating the gradients of k small batches gives the gradient of a large one for everything but batch norm. That is
normalized by each small batch's statistics, and its running statistics move k times a step.

## How it comes about

`loss.backward()` k times, then one `optimizer.step()`; the `accumulate_grad_batches` or
`gradient_accumulation_steps` of a trainer. The rule divides `num_batches_tracked` by the optimizer's own count of its
steps, which Adam and its kin keep and SGD does not. It speaks only where the counts fit a whole number from 2 to 64:
an optimizer that began on a trained network fits none.

## What to do

- `batchnorm.accumulate(model, k)`: the statistics of all k small batches together.
- If the small batches are large enough, nothing: `momentum = 1 - (1 - momentum) ** (1 / k)` keeps the average as long
  as it was.
"""

from collections.abc import Iterator

from batchnorm.checks.evidence import Evidence, Layer
from batchnorm.checks.finding import Finding
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN111"]

_STEPS = 8  # below that every ratio is nearly a whole number
_MOST = 64


@rule(
    "BN111",
    "gradients are accumulated",
    "info",
    needs=["model", "optimizer"],
    reference="https://github.com/pytorch/pytorch/issues/46516",
)
def BN111(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """Updates of the running statistics against steps of the optimizer."""
    steps = evidence.steps
    if steps is None or steps < _STEPS:
        return
    found: dict[int, list[Layer]] = {}
    for layer in evidence.layers:
        if not layer.updates or layer.frozen or layer.mean is None or layer.momentum == 0:
            continue
        seen = evidence.seen.get(layer.name)
        # What one forward and backward counts by itself is BN105's.
        own = max(1, (seen.updates_step or seen.updates_forward or 1) if seen is not None else 1)
        times, left = divmod(layer.updates // own, steps)
        # Left over: small batches of a step that has not been taken yet, and steps that a gradient scaler has skipped.
        if 2 <= times <= _MOST and left <= times + steps // 100:
            found.setdefault(times, []).append(layer)
    for times, layers in found.items():
        yield self.finding(
            layers[0].name,
            f"running statistics moved {times} times for each of {steps} steps of the optimizer",
            cause=f"gradients of {times} small batches are accumulated, and each is normalized by itself",
            fix=f"batchnorm.accumulate(model, {times})",
            also=tuple(layer.name for layer in layers[1:]),
            evidence={"steps": steps, "updates": layers[0].updates, "times": times},
        )
