"""The running statistics of a layer move more than once in a training step.

The rule runs one forward and one backward in training mode and reads `num_batches_tracked`.

## How it comes about

- **Activation checkpointing.** `torch.utils.checkpoint` runs the forward a second time in backward, and the running
  statistics move again, by the same batch: a momentum of 0.1 acts as 0.19, and what they average over is half as long.
  This is a warning.
- **Several calls in one forward.** A layer that is shared by branches, or a network that is run on two inputs, counts
  each. That is common and an "info"; whether the inputs differ so much that their mixture fits none is BN110's.

## What to do

Checkpointing: this package's layers do not count a recomputation; `batchnorm.convert(model, "batchnorm")`.
`findings.fix()` does so for these layers, unless they are called several times a forward, too. With PyTorch's layers
`momentum = 1 - (1 - momentum) ** 0.5` gives back what was meant.
"""

from collections.abc import Iterator

from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN105"]


@rule(
    "BN105",
    "statistics move more than once a step",
    "warning",
    needs=["model", "batches"],
    reference="https://github.com/pytorch/pytorch/issues/96136",
)
def BN105(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """Counters before, between and after forward and backward."""
    for layer, seen in evidence.observed():
        forward, step = seen.updates_forward, seen.updates_step
        momentum = layer.momentum
        if not forward or momentum == 0:
            continue
        if step is not None and step > forward:
            if momentum is None:
                acts, fix = "counts batches twice", 'batchnorm.convert(model, "batchnorm")'
            else:
                acts = f"a momentum of {momentum:g} acts as {1 - (1 - momentum) ** (step / forward):.3g}"
                right = 1 - (1 - momentum) ** (forward / step)
                fix = f'batchnorm.convert(model, "batchnorm"), or layer.momentum = {right:.3g}'
            yield self.finding(
                layer.name,
                f"{step} updates of the running statistics in a step, {step - forward} of them in backward",
                cause=f"activation checkpointing runs the forward again, and it counts again: {acts}",
                fix=fix,
                evidence={"forward": forward, "step": step, "cause": "recomputation"},
            )
        elif forward > 1:
            yield self.finding(
                layer.name,
                f"{forward} updates of the running statistics in one forward",
                cause="the layer is called several times a forward, and its running statistics mix what it gets",
                fix="nothing, if all its inputs are alike (BN110 looks at that); else a layer for each",
                severity="info",
                evidence={"forward": forward, "step": step, "cause": "calls"},
            )
