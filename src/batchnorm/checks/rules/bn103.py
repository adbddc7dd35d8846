"""A batch has too few values per channel for its mean and variance to mean much.

Training normalizes by the batch's mean. Its standard error tells how much of that is chance: sqrt(between / samples),
where between is the variance of the samples' own means. The rule gives it in σ of the values. Positions of one image
are alike, so a large image does not make up for few samples. ResNet-50 on ImageNet loses 1.2 points of accuracy with 8
images per batch, 3.7 with 4 and 11 with 2, against 32 (Wu and He, 2018).

## How it comes about

- Small batches because of memory: detection, segmentation, video, 3-d images.
- A batch norm behind global pooling, where an image is one value per channel.
- A large batch cut up over many processes, each with its own statistics (BN016).

The batches that you give here should be as large as those of the training. A batch norm with fewer than 16 values per
channel is an "info"; it is a warning where the mean is uncertain by 0.4 σ or more (six samples behind global pooling,
two in the middle of a network).

## What to do

- Larger batches; several processes: `batchnorm.convert(model, "sync")`.
- `batchnorm.convert(model, "renorm")` normalizes by statistics that are corrected towards the running ones.
- Pretrained: `batchnorm.freeze(model)` uses the running statistics in training, too.
"""

from collections.abc import Iterator

from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding, Severity
from batchnorm.checks.measures import median, standard_error
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN103"]

_UNCERTAIN = 0.4  # σ
_FEW = 16


@rule(
    "BN103",
    "too few values per channel",
    "warning",
    needs=["model", "batches"],
    reference="https://arxiv.org/abs/1803.08494",
)
def BN103(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """The standard error of a batch's mean, and the count."""
    found: dict[tuple[Severity, int], list[tuple[str, float]]] = {}
    for layer, seen in evidence.observed():
        calls = [call for call in seen.train if call.samples > 1]
        if not calls or not seen.training or layer.kind == "BatchRenorm":
            continue
        processes = evidence.world_size if layer.synchronized else 1
        # The usual batch: the last one may be short, which is BN104's.
        count = processes * sorted(call.samples * call.positions for call in calls)[len(calls) // 2]
        error = median(standard_error(calls, processes))
        if error != error:  # no channel varies
            continue
        if error >= _UNCERTAIN:
            found.setdefault(("warning", count), []).append((layer.name, error))
        elif count < _FEW:
            found.setdefault(("info", count), []).append((layer.name, error))
    for (severity, count), layers in found.items():
        error = max(each for _, each in layers)
        yield self.finding(
            layers[0][0],
            f"{count} values per channel in a batch: its mean has a standard error of {error:.2f} σ",
            cause="samples are normalized by a mean and a variance that are largely chance",
            fix='larger batches, or batchnorm.convert(model, "renorm"), or batchnorm.freeze(model) if it is pretrained',
            severity=severity,
            also=tuple(name for name, _ in layers[1:]),
            evidence={"values": count, "standard_error": error},
        )
