"""Some batch norms are in training mode and others in eval mode.

A layer in training mode normalizes by the batch and moves its running statistics; one in eval mode does
neither. Layers that `batchnorm.freeze` has frozen are not counted: their mode is on purpose and stays.

- The model is in training mode, and some of its layers in eval mode (a warning): as far as they go it is
  trained with statistics that do not follow its weights. A part that is frozen on purpose (a pretrained
  backbone) looks the same: the message names the parts. `model.train()` ends it without a word, so it is better
  said with `freeze`.
- The model is in eval mode, and some of its layers in training mode (an error): its output for a sample depends
  on what else is in the batch, and every call changes the running statistics.

A model that is in one mode throughout is no finding.

## How it comes about

`backbone.eval()` before a `model.train()` that undoes it, or a `train()` of the model's own that forgets a
part; a callback that switches modes for validation and does not put them back.

## What to do

- Meant: `batchnorm.freeze(model.backbone, inplace=True)`, which holds through `model.train()`.
- Not meant: `model.train()`, or `model.eval()`.
"""

from collections.abc import Iterator, Sequence

from batchnorm.checks._words import code_for, parts
from batchnorm.checks.evidence import Evidence, Layer
from batchnorm.checks.finding import Finding
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN009"]

_SHOWN = 3


@rule(
    "BN009",
    "some layers train while others are in eval mode",
    "warning",
    needs=["model"],
    reference="https://github.com/pytorch/pytorch/issues/86590",
)
def BN009(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """Layers without running statistics do the same in both modes."""
    layers = [each for each in evidence.layers if each.mean is not None and not each.frozen]
    training = [each for each in layers if each.training]
    still = [each for each in layers if not each.training]
    if evidence.training is False and training:
        what, _ = _where(training, layers)
        yield self.finding(
            training[0].name,
            f"{len(training)} of {len(layers)} batch norms are in training mode while the model is in eval mode: "
            f"{what}",
            cause="the output for a sample depends on the rest of its batch, and every call moves the statistics",
            fix="model.eval()",
            severity="error",
            evidence={"training": len(training), "eval": len(still)},
            also=tuple(each.name for each in training[1:]),
        )
    elif evidence.training and training and still:
        what, code = _where(still, layers)
        yield self.finding(
            still[0].name,
            f"{len(still)} of {len(layers)} batch norms are in eval mode while the model is in training mode: {what}",
            cause="their statistics do not follow the weights, and the next model.train() ends it without a word",
            fix=f"meant: batchnorm.freeze({code}, inplace=True); not meant: model.train()",
            evidence={"training": len(training), "eval": len(still)},
            also=tuple(each.name for each in still[1:]),
        )


def _where(some: Sequence[Layer], layers: Sequence[Layer]) -> tuple[str, str]:
    """The parts that they make up, in words, and code for the first."""
    found = parts((each.name for each in some), (each.name for each in layers))
    names = {each.name for each in layers}
    said = [each if each in names else f"all of {each or 'the model'}" for each in found]
    more = f" and {len(said) - _SHOWN} more" if len(said) > _SHOWN else ""
    return ", ".join(said[:_SHOWN]) + more, code_for(found[0])
