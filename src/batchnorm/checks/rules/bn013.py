"""Dropout right before a batch norm: in eval mode the layer's input has another variance than in training.

Dropout with share p makes an input of mean μ and variance σ² one of variance (σ² + p·μ²)/(1 − p) in training,
and leaves it alone in eval mode. The running variance is that of training, so in eval mode the layer's output
has √(1 − p) of its spread, or less: 71 % at p = 0.5. All that comes behind was trained with more.

Counted is dropout between which and the batch norm nothing mixes channels or positions (pooling, reshaping).
Alpha dropout keeps the variance and is none.

## What to do

- Put the dropout behind the last batch norm, as the paper advises.
- For a network that is trained already: `batchnorm.recalibrate(model, loader)` sets the statistics to those
  without dropout.
"""

from collections.abc import Iterator

from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN013"]


@rule(
    "BN013",
    "dropout right before batch norm",
    "info",
    needs=["model", "graph"],
    reference="https://arxiv.org/abs/1801.05134",
)
def BN013(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """Layers whose statistics do not come from training with dropout have no such shift."""
    for layer in evidence.layers:
        around = evidence.neighbours.get(layer.name)
        if around is None or not around.dropout_before or layer.mean is None or layer.frozen:
            continue
        left = 100 * (1 - min(around.dropout, 1.0)) ** 0.5
        yield self.finding(
            layer.name,
            f"dropout with p = {around.dropout:g} stands right before it: in eval mode its output has at most "
            f"{left:.0f} % of the spread that it has in training",
            cause="running variance is that of the dropped input, which is larger by 1/(1 − p) or more",
            fix="put the dropout behind the last batch norm; a trained model: batchnorm.recalibrate(model, loader)",
            evidence={"dropout": around.dropout_before, "p": around.dropout},
        )
