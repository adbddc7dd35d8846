"""One layer is fed from several sources whose statistics differ.

The layer is called several times in one forward, and what it gets at one place differs from what it gets at another, in
the same way in every batch: means by more than half a σ, or variances by more than a factor of four, in a quarter of
the channels or more, and by more than chance does to so few samples. In training each call is normalized by its own
statistics. The running ones are a mixture that fits none of them, so eval normalizes both wrongly.

Where that shows already, half as much is enough: a quarter of a σ or a factor of two, if the outputs of the network in
training and eval mode are apart by 30 % of their spread or more (BN101 says when exactly). A discriminator can live on
so little: it is what training mode takes away.

## How it comes about

- Real and generated images through one discriminator; source and target domain through one network; two kinds of
  images or sensors.
- A layer shared by the levels of a pyramid or by the steps of a recurrent network.

## What to do

Statistics of its own for each source: `batchnorm.convert(model, "domain")`, where weights are shared and statistics are
not. Or put all sources into one batch, if the same statistics are meant for all.
"""

from collections.abc import Iterator

from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding
from batchnorm.checks.measures import outputs_differ, sites_apart
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN110"]

_MEAN, _FACTOR = 0.5, 4.0
# Where the outputs in training and eval mode differ.
_SHOWN_MEAN, _SHOWN_FACTOR = 0.25, 2.0


@rule(
    "BN110",
    "one layer, several sources",
    "warning",
    needs=["model", "batches"],
    reference="https://arxiv.org/abs/1603.04779",
)
def BN110(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """Compare the calls of a layer within one forward."""
    shown = outputs_differ(evidence.run)
    least, narrowest = (_SHOWN_MEAN, _SHOWN_FACTOR) if shown else (_MEAN, _FACTOR)
    found = []
    for layer, seen in evidence.observed():
        if not seen.training or layer.mean is None or "Domain" in layer.kind:
            continue
        sites = sites_apart(seen)
        if sites is not None and (sites.mean > least or sites.factor > narrowest):
            found.append((sites, layer.name))
    if not found:
        return
    worst, name = max(found, key=lambda each: max(each[0].mean / _MEAN, each[0].factor / _FACTOR))
    yield self.finding(
        name,
        f"{worst.calls} calls in a step: what call {worst.second + 1} gets is {worst.mean:.1f} σ from what call "
        f"{worst.first + 1} gets, its variance {worst.factor:.1f} times apart (a quarter of the channels, "
        "in every batch)",
        cause="training normalizes each by its own statistics, eval all by their mixture, which fits none",
        fix='batchnorm.convert(model, "domain")',
        also=tuple(each for _, each in found if each != name),
        evidence={"calls": worst.calls, "sigma": worst.mean, "factor": worst.factor},
    )
