"""In eval mode the output for a sample changes with the other samples of the batch.

The rule runs a batch in eval mode, replaces half of its samples, and looks at the outputs of the other half. They must
not move. If they do, a prediction depends on who else was in the batch: results cannot be repeated, and a single sample
cannot be predicted.

## How it comes about

- Some batch norms stay in training mode after `model.eval()`: a `train` method of the model's own that sets them back,
  or layers that are kept in a plain Python list, which `eval()` does not reach.
- Batch norms without running statistics (`track_running_stats=False`) normalize by the batch in every mode. For
  batch norms this is by design; it is an error all the same wherever single predictions are made.
- Something else mixes samples: `F.batch_norm(training=True)` in the forward, attention over the batch, graph layers.
  Where no batch norm does it, the finding is an "info", for it may be meant.

## What to do

Call `model.eval()` and see that it reaches the layers that are named. Give the layers running statistics:
`track_running_stats=True`, then `batchnorm.recalibrate(model, loader)`.
"""

from collections.abc import Iterator

import torch

from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN102"]

# In the spread of the outputs. Shapes and random numbers are the same in both runs, so that a network without such a
# dependence is off by its rounding at most: 0 for most, 1e-6 where sums run in another order.
_BOUND = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
_USUAL = 1e-3


@rule(
    "BN102",
    "a sample's output depends on its neighbours",
    "error",
    needs=["model", "batches"],
    reference="https://discuss.pytorch.org/t/7146",
)
def BN102(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """Look at how far outputs move in eval mode when other samples are replaced."""
    run = evidence.run
    moved = run.neighbours_eval
    if moved is None or moved <= _BOUND.get(run.output_dtype or torch.float32, _USUAL):
        return
    by_batch = [(layer, seen) for layer, seen in evidence.observed() if seen.batch_in_eval]
    what = f"in eval mode outputs move by {100 * moved:.2g} % of their spread when other samples of the batch change"
    if not by_batch:
        yield self.finding(
            "",
            what,
            cause="no batch norm does it: something else mixes the samples of a batch, as graph layers, attention over "
            "the batch or F.batch_norm(training=True) do",
            fix="look for what mixes samples; nothing is wrong if it is meant",
            severity="info",
            evidence={"moved": moved},
        )
        return
    without = [layer.name for layer, _ in by_batch if layer.mean is None]
    names = tuple(layer.name for layer, _ in by_batch)
    if len(without) == len(names):
        cause = "these layers have no running statistics and normalize by the batch in eval mode as well"
        fix = "track_running_stats=True, then batchnorm.recalibrate(model, loader)"
    else:
        cause = (
            "these layers are in training mode although the model is in eval mode, and normalize by the batch"
        )
        fix = "let model.eval() reach them: a train() of your own, or layers outside the module tree, keeps it away"
    yield self.finding(
        names[0], what, cause=cause, fix=fix, also=names[1:], evidence={"moved": moved, "layers": len(names)}
    )
