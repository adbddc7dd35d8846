"""A batch norm that `batchnorm.fold` would leave in place.

For inference a batch norm is a factor and a shift a channel, and folds into the convolution or linear layer
beside it. This one does not, for the reason in the message. That is no mistake; it costs a pass over the data
in every forward, and quantization and export tools that fold less carefully get it wrong.

The one to know: a batch norm straight before a convolution that pads with zeros. The zeros do not get the
shift, so folding it into the bias gives other numbers at the border. Tools that do it all the same are off
there.

Layers without running statistics have a rule of their own (BN011), and of layers that no forward calls nothing
is said.

## What to do

Nothing, for training. For inference: `batchnorm.fold(model, example)` folds the others, and an example can tell
what the code cannot (the number of axes). In a new network put the batch norm behind the convolution.
"""

import re
from collections.abc import Iterator

from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN018"]

_NAMES = re.compile(r" \([\w.]+\)")
_NOT_CALLED = "no forward that could be traced calls it"


@rule(
    "BN018",
    "batch norm that does not fold",
    "info",
    needs=["model", "graph"],
    reference="https://github.com/pytorch/pytorch/issues/180995",
)
def BN018(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """The reasons on the side before, without the names of the layers, so that equal ones are one finding."""
    for layer in evidence.layers:
        around = evidence.neighbours.get(layer.name)
        reason = "" if around is None else around.unfoldable
        if around is None or not reason or reason == _NOT_CALLED or layer.mean is None:
            continue
        if around.padded_behind:
            yield self.finding(
                layer.name,
                "it stands straight before a convolution that pads with zeros, which would not get its shift",
                cause="batch norm gives its shift to every input of the convolution, and the padding has none",
                fix="nothing for training; batchnorm.fold leaves it, other tools may not: check the border",
                evidence={"behind": around.padded_behind, "reason": reason},
            )
        else:
            yield self.finding(
                layer.name,
                f"it does not fold for inference: {_NAMES.sub('', reason.split('; ')[0])}",
                cause="what stands beside it is no single layer that could take its factor and shift",
                fix="nothing for training; batchnorm.fold(model, example) folds the others",
                evidence={"reason": reason},
            )
