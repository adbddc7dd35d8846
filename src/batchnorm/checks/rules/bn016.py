"""Several processes train the model, and each normalizes by few samples of its own.

Batch norm's statistics are as good as the samples behind them. In the measurement of Wu and He (ResNet-50,
ImageNet) the error is 23.6 % with 32 samples a process, 23.7 % with 16, then 24.8 % with 8, 27.3 % with 4 and
34.7 % with 2. So fewer than 16 are reported. Positions do not help much: those of one picture are alike.

Layers that are synchronized, frozen, in eval mode, or made for small batches (GhostBatchNorm, BatchRenorm) are
not counted. It is found with `batches` and, outside of `torch.distributed`, `world_size`.

## What to do

`batchnorm.convert(model, "sync")`: statistics of all processes. `findings.fix()` does so for these layers. If they
together have few, `batchnorm.convert(model, "renorm")`, or `batchnorm.freeze(model)` when fine-tuning.
"""

from collections.abc import Iterator
from statistics import median

from batchnorm.checks.evidence import Evidence, Layer, Seen
from batchnorm.checks.finding import Finding
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN016"]

_FEW = 16
_MADE_FOR_IT = ("Ghost", "Renorm", "Virtual")


@rule(
    "BN016",
    "few samples per process, not synchronized",
    "warning",
    needs=["model", "batches", "world_size"],
    reference="https://arxiv.org/abs/1803.08494",
)
def BN016(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """The usual batch, for the last one may be smaller."""
    sizes = [fed.samples for fed in evidence.run.batches if fed.samples]
    for layer, seen in evidence.observed():
        if not _alone(layer, seen):
            continue
        samples = int(median(sizes or [call.samples for call in seen.train]))
        together = samples * evidence.world_size
        if samples < _FEW:
            to = "sync" if together >= _FEW else "renorm"
            yield self.finding(
                layer.name,
                f"each of {evidence.world_size} processes normalizes by {samples} samples of its own; they have "
                f"{together} together",
                cause="below 16 samples the batch's mean and variance are noise enough to cost accuracy",
                fix=f'batchnorm.convert(model, "{to}")',
                evidence={
                    "samples": samples,
                    "world_size": evidence.world_size,
                    "together": together,
                    "to": to,
                },
            )


def _alone(layer: Layer, seen: Seen) -> bool:
    made_for_it = any(word in layer.kind for word in _MADE_FOR_IT)
    return bool(seen.train) and seen.training and not (layer.synchronized or layer.frozen or made_for_it)
