"""A layer has no running statistics: in eval mode, too, it normalizes by the batch.

What the model says of a sample then depends on what else is in the batch, and on how large it is; a single
sample cannot be normalized at all where it gives one value per channel. It cannot be folded, and exporters may
write something else.

## How it comes about

`track_running_stats=False`, or `torch.func.replace_all_batch_norm_modules_`. In meta-learning and for
stylization it is on purpose: the batch at hand is what shall count. Then ignore the rule.

## What to do

Make the layer with `track_running_stats=True`, load the weights with `strict=False`, and set the statistics
from data: `batchnorm.recalibrate(model, loader)`. If samples shall not see each other, and the statistics of
one are enough, that is another layer: `torch.nn.InstanceNorm2d`.
"""

from collections.abc import Iterator

from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN011"]


@rule(
    "BN011",
    "no running statistics",
    "warning",
    needs=["model"],
    reference="https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html",
)
def BN011(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """With buffers they are used, whatever track_running_stats says later."""
    for layer in evidence.layers:
        if layer.kept_in is None:
            yield self.finding(
                layer.name,
                "it has no running statistics: in eval mode, too, the output for a sample depends on its batch",
                cause="it was made with track_running_stats=False, or its buffers were taken away",
                fix="make it with track_running_stats=True, then batchnorm.recalibrate(model, loader)",
                evidence={"tracks": layer.tracks},
            )
