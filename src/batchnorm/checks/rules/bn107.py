"""Batches differ from each other more than shuffled batches would.

If samples are drawn at random, the means of batches scatter by sqrt(between / samples). The rule measures how much they
scatter (an analysis of variance over your batches, in eval mode), in every layer and in the model's own input, and
speaks where chance is out of the question and the difference is large: 0.25 σ or more.

Where batches are pairs of an input and whole numbers, one a sample, these are taken for classes, and the rule also
counts how many of them a batch has. It speaks where two samples of a batch are of different classes less than 0.7 times
as often as any two samples, and a hundred random deals of the same labels say that this is no chance. More variety than
by chance, as class-balanced samplers give it, is no fault. Whole numbers of which most come once are no classes, nor
are masks, tokens and floating-point targets.

Batch norm then takes away what a batch has in common, which may be just what is to be learned: in training every batch
is centred on itself, in eval on the average of all. On the digits sorted by class, test accuracy falls from 96 % to
17 %; rented bikes with one day per batch have five times the error.

## How it comes about

- A DataLoader without `shuffle=True` on data sorted by class, patient, day or file.
- A shuffle buffer that is small against the data (`IterableDataset`, `tf.data`).
- Batches that are one video, one bag, one user on purpose.

## What to do

`DataLoader(..., shuffle=True)`. Recalibrating does not give back what was not learned. Where a batch must be one
source: `batchnorm.convert(model, "renorm")`, or a norm that looks at single samples.

The means of four batches are needed, and only layers that have one row per sample are looked at; of the input pictures
in up to 8×8 cells, other input feature by feature. Of labels two batches are enough. The first batches of a sorted file
may all be of one class: then they say nothing, but where a DataLoader goes through its data in order and the dataset
keeps its labels (the second tensor of a `TensorDataset`, `dataset.targets`), up to 64 batches of all of them are
counted. A loader that does not shuffle is by itself no evidence, since the data may lie there shuffled.

`batchnorm.watch` looks at the model's input, where no weight moves between two batches. Batches that differ only in
what a network makes of them, and labels, are for `check`.
"""

from collections.abc import Iterator

from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding
from batchnorm.checks.measures import Scatter, scatter, scatter_of
from batchnorm.checks.rule import Rule, rule
from batchnorm.checks.variety import Variety, variety

__all__ = ["BN107"]

# In σ, in a tenth of the channels. Digits sorted by class: 0.8; one day of bikes per batch: 0.65. Digits of five
# classes a batch, which cost 2 points of accuracy: 0.28, and not sure.
_EXCESS = 0.25
_RATIO = 2.0
# Pairs of samples with different labels, in a batch over in all. A small conv net on digits, two seeds: 0.55 (two
# classes a batch) costs it 25 points of accuracy, 0.74 (three) 4 and 0.89 (five) 9, the noise of a seed.
# Batches made of some people on purpose, eight pictures of each of four: 0.77.
_VARIETY = 0.7
_FEWER = 0.5  # classes a batch, for the words


@rule(
    "BN107",
    "batches are not shuffled",
    "warning",
    needs=["model", "batches"],
    reference="https://arxiv.org/abs/1702.03275",
)
def BN107(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """Compare the scatter of batch means with that of independent samples."""
    reached = [(layer, seen) for layer, seen in evidence.observed() if seen.training]
    if not reached:
        return
    found = [
        (measured, layer.name)
        for layer, seen in reached
        if (measured := scatter(seen, evidence.run)) is not None and _large(measured)
    ]
    at_input = scatter_of(evidence.run.inputs)
    if not found and at_input is not None and _large(at_input):
        found.append((at_input, ""))
    labels = None if evidence.run.labels is None else variety(evidence.run.labels, _VARIETY)
    if labels is not None and not labels.sure:
        labels = None
    if not found and labels is None:
        return
    worst, name = max(found, key=lambda each: each[0].excess, default=(None, ""))
    said: list[str] = []
    numbers: dict[str, float] = {}
    if labels is not None:
        said.append(_of_labels(labels))
        numbers |= {"classes": labels.held, "by_chance": labels.chance, "variety": labels.share}
    if worst is not None:
        said.append(
            f"the means of the batches scatter {worst.ratio:.1f} times as much as those of shuffled samples, "
            f"{worst.excess:.1f} σ beyond chance ({worst.batches} batches)"
        )
        numbers |= {"ratio": worst.ratio, "sigma": worst.excess, "certainty": worst.certainty}
    yield self.finding(
        name,
        "; ".join(said),
        cause="samples of a batch have something in common, and batch norm takes it away in training but not in eval",
        fix="DataLoader(..., shuffle=True)",
        also=tuple(each for _, each in found if each != name),
        evidence=numbers,
    )


def _of_labels(labels: Variety) -> str:
    if labels.chance - labels.held >= _FEWER:
        return (
            f"batches hold {labels.held:.1f} of {labels.classes} classes on average, {labels.chance:.1f} by chance "
            f"({labels.batches} batches)"
        )
    # Every class is in most batches, but in some by far more often.
    return (
        f"two samples of a batch have different labels {labels.share:.2f} times as often as any two samples "
        f"({labels.batches} batches)"
    )


def _large(measured: Scatter) -> bool:
    return measured.sure and measured.excess >= _EXCESS and measured.ratio >= _RATIO
