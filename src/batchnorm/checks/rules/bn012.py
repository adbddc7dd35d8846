"""The bias of the layer before a batch norm is subtracted again.

A constant that is added to a channel is part of the batch's mean, and the batch norm subtracts the mean. The
bias gets no gradient but rounding, and whatever value it has, the output is the same; β of the batch norm takes
its place. It costs a little memory and time, and does no harm.

Named are layers that feed a batch norm and nothing else, in training and in eval mode, where that can be seen
in the forward. Before a frozen layer a bias is not dead: the mean stays, and the bias is trained.

## What to do

`batchnorm.absorb_bias(model)` takes the bias out and corrects the running mean, so that the outputs stay. In
code, `bias=False`. `findings.fix()` leaves it: the state dict loses a key, and a checkpoint from before, loaded with
`strict=False`, would be off by the bias in eval mode.
"""

from collections.abc import Iterator

from batchnorm.checks._words import count
from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN012"]


@rule(
    "BN012",
    "bias that batch norm subtracts again",
    "info",
    needs=["model", "graph"],
    reference="https://arxiv.org/abs/1502.03167",
)
def BN012(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """Section 3.2 of the paper: the bias can be ignored."""
    found = {}
    for layer in evidence.layers:
        around = evidence.neighbours.get(layer.name)
        if around is not None and around.before_bias and not layer.frozen:
            found[layer.name] = around.before
    if found:
        first, *others = found
        yield self.finding(
            first,
            f"the layers before {count(len(found), 'batch norm')} have a bias, which is subtracted again"
            if len(found) > 1
            else f"{found[first]}, the layer before it, has a bias, which is subtracted again",
            cause="a constant of a channel is part of its mean",
            fix="batchnorm.absorb_bias(model)",
            evidence={"before": found},
            also=tuple(others),
        )
