"""Channels that say nothing: their output is the same number whatever comes in.

A channel is counted if its input does not vary (the running variance is below eps / 10,000, so that less than 1
% of normalized spread is left), or if γ·σ/√(σ² + eps), the spread of its output, is less than a thousandth of
the layer's largest. From a state dict, eps is taken to be 1e-5.

It is common in healthy networks, and only worth knowing: 37 of 17,056 channels in MobileNetV2, 130 of 21,008 in
EfficientNet-lite0. It is capacity and time that is paid for and not used. A layer whose γ are all 0 is no
finding: residual branches are initialized so.

## How it comes about

- A ReLU before it that never opens: the channel's input is always 0.
- Weight decay on γ, which pulls a channel of little use to 0.
- An L1 penalty on γ, whose purpose it is.

## What to do

Nothing, if the accuracy is right. To have fewer of them, train with
`batchnorm.parameter_groups(model, weight_decay)`, which spares γ, and with a lower learning rate. To profit,
prune them: what comes behind gets a constant.
"""

from collections.abc import Iterator

from batchnorm.checks._words import count, share
from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding
from batchnorm.checks.measures import dead
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN007"]


@rule("BN007", "dead channels", "info", reference="https://arxiv.org/abs/1708.06519")
def BN007(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """One finding for the model: where most of them are, and how many."""
    found: dict[str, int] = {}
    of = 0
    for layer in evidence.layers:
        of += layer.channels
        number = int(dead(layer).sum())
        if number:
            found[layer.name] = number
    if not found:
        return
    number = sum(found.values())
    worst, *others = sorted(found, key=lambda name: -found[name])
    yield self.finding(
        worst,
        f"{number:,} of {of:,} channels ({share(number, of)}) are dead, in {count(len(found), 'layer')}: "
        "their output is constant",
        cause="a ReLU before them that never opens, or weight decay that has pulled γ to 0",
        fix="nothing, if accuracy is right; batchnorm.parameter_groups(model, weight_decay) spares γ",
        evidence={"channels": number, "of": of, "layers": found},
        also=tuple(others),
    )
