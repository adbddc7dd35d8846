"""Weight decay on γ and β of batch norm.

Decay pulls γ to 0, which shrinks the signal of the channel and can switch it off (BN007), and β to 0 for no
reason. It regularizes nothing: a channel has one number of each, and the size of the weights before a batch
norm does not matter. The effect on accuracy is small; recipes that spare them gain some tenths of a percent.

## How it comes about

`Optimizer(model.parameters(), weight_decay=...)`, which is one group for all.

## What to do

`Optimizer(batchnorm.parameter_groups(model, 5e-4), ...)`: the same decay for everything but normalization
layers and biases.
"""

from collections.abc import Iterator

from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN014"]


@rule(
    "BN014",
    "weight decay on γ and β",
    "info",
    needs=["model", "optimizer"],
    reference="https://arxiv.org/abs/1812.01187",
)
def BN014(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """Of parameters that are trained."""
    for layer in evidence.layers:
        decay = evidence.decay.get(layer.name)
        if decay is None:
            continue
        on = {
            "γ": decay.weight if layer.weight_trained else 0.0,
            "β": decay.bias if layer.bias_trained else 0.0,
        }
        on = {name: value for name, value in on.items() if value}
        if on:
            most = max(on.values())
            yield self.finding(
                layer.name,
                f"the optimizer puts weight decay of {most:g} on {' and '.join(on)}",
                cause="decay of γ shrinks the signal and regularizes nothing",
                fix=f"give the optimizer batchnorm.parameter_groups(model, {most:g})",
                evidence={"decay": on},
            )
