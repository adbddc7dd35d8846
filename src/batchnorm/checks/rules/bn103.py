"""A batch has too few values per channel for its mean and variance to mean much.

Training normalizes by the batch's mean. Its standard error tells how much of that is chance: sqrt(between / samples),
where between is the variance of the samples' own means. The rule gives it in σ of the values. Positions of one image
are alike, so a large image does not make up for few samples. ResNet-50 on ImageNet loses 1.2 points of accuracy with 8
images per batch, 3.7 with 4 and 11 with 2, against 32 (Wu and He, 2018).

Two samples are too few even where many positions make their mean certain. Each is then half of its own statistics,
which take half of what sets the two apart. A network for volumes of 8×8×8, whose means are certain to 0.1 σ, gets 75 %
right if every two volumes of a batch of 16 are normalized by themselves, 87 % by fours, and 89 % by the whole batch
(six trainings each, the same steps).

## How it comes about

- Small batches because of memory: detection, segmentation, video, 3-d images.
- A batch norm behind global pooling, where an image is one value per channel.
- A large batch cut up over many processes, each with its own statistics (BN016).

The batches that you give here should be as large as those of the training. Where their sizes differ, the rule judges
one of the median size. A batch norm with fewer than 16 values per channel is an "info"; it is a warning where the mean
is uncertain by 0.4 σ or more (six samples behind global pooling), and with two samples a batch. Batches of one are left
alone: what normalizes them is their own, which some networks for images want.

## What to do

- Larger batches; several processes: `batchnorm.convert(model, "sync")`.
- `batchnorm.convert(model, "renorm")` normalizes by statistics that are corrected towards the running ones.
- Pretrained: `batchnorm.freeze(model)` uses the running statistics in training, too.
"""

from collections.abc import Iterator

from batchnorm.checks.evidence import Evidence, Layer
from batchnorm.checks.finding import Finding, Severity
from batchnorm.checks.measures import median, usual_error, usual_of
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN103"]

_UNCERTAIN = 0.4  # σ
_FEW = 16
_PAIR = 2


@rule(
    "BN103",
    "too few values per channel",
    "warning",
    needs=["model", "batches"],
    reference="https://arxiv.org/abs/1803.08494",
)
def BN103(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """The standard error of the usual batch's mean, and its counts of values and of samples."""
    found: dict[tuple[Severity, str, str], list[tuple[Layer, int, float]]] = {}
    for layer, seen in evidence.observed():
        calls = [call for call in seen.train if call.samples > 1]
        if not calls or not seen.training or layer.kind == "BatchRenorm":
            continue
        processes = evidence.world_size if layer.synchronized else 1
        # A short last batch is BN104's.
        count = processes * usual_of([call.samples * call.positions for call in calls])
        samples = processes * usual_of([call.samples for call in calls])
        error = median(usual_error(calls, processes))
        if error != error:  # no channel varies
            continue
        severity: Severity = "warning" if error >= _UNCERTAIN or samples <= _PAIR else "info"
        if error < _UNCERTAIN and samples <= _PAIR:
            what = f"{samples} samples in a batch"
            cause = (
                "each sample is half of its own mean and variance, which take half of what sets the two apart"
            )
        else:
            what = f"{count} values per channel in a batch"
            cause = "samples are normalized by a mean and a variance that are largely chance"
        if severity == "warning" or count < _FEW:
            found.setdefault((severity, what, cause), []).append((layer, count, error))
    for (severity, what, cause), layers in found.items():
        error = max(each for _, _, each in layers)
        yield self.finding(
            layers[0][0].name,
            f"{what}: its mean has a standard error of {error:.2f} σ",
            cause=cause,
            fix='larger batches, or batchnorm.convert(model, "renorm"), or batchnorm.freeze(model) if it is pretrained',
            severity=severity,
            also=tuple(layer.name for layer, _, _ in layers[1:]),
            evidence={"values": layers[0][1], "standard_error": error},
        )
