"""In a contrastive setting samples can see each other through the batch statistics.

The loss compares two views of a sample with those of others. Batch norm puts something of all samples into each of
them: two views that were in one batch share its statistics, and the network can tell by them which belong together,
without learning what is in the image. The loss falls, the representation is poor.

The rule speaks if most batches hold two views of each sample and the model gets both, its output is one vector per
sample, and outputs in training mode move by more than 5 % of their spread when other samples of the batch are replaced.

## How it comes about

MoCo's authors found it and shuffle the batch over the GPUs before the key encoder, so that a sample and its positive
are normalized by different statistics. SimCLR and BYOL normalize over the whole batch of all processes: the larger the
batch, the less a sample shows in it.

## What to do

- Several processes: `batchnorm.convert(model, "sync")`, as in SimCLR, or shuffle the keys, as in MoCo.
- One process: `batchnorm.convert(model, "ghost")` and a permutation of the keys before their encoder, undone behind it:
  MoCo's trick on one GPU.
- Or a norm that does not mix samples.
"""

from collections.abc import Iterator

from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN113"]

_MOVED = 0.05


@rule(
    "BN113",
    "samples leak to each other",
    "warning",
    needs=["model", "batches"],
    reference="https://arxiv.org/abs/1911.05722",
)
def BN113(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """Pairs of views, vectors as outputs, and a dependence on the rest of the batch."""
    run, moved = evidence.run, evidence.run.neighbours_train
    if not run.pairs or moved is None or moved <= _MOVED or len(run.output) != 2:
        return
    layers = [
        layer.name
        for layer, seen in evidence.observed()
        if seen.training and not layer.synchronized and layer.kind != "GhostBatchNorm"
    ]
    if layers:
        yield self.finding(
            layers[0],
            f"two views of each sample, and outputs move by {100 * moved:.0f} % of their spread when other samples of "
            "the batch are replaced",
            cause="batch statistics tell which samples came together, so the loss can fall without learning (MoCo)",
            fix='batchnorm.convert(model, "sync") or "ghost", and shuffle the keys before their encoder',
            also=tuple(layers[1:]),
            evidence={"moved": moved},
        )
