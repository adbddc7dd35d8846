"""Weight and bias are frozen, the running statistics are not.

`requires_grad_(False)` keeps γ and β as they are; mean and variance are no parameters and move with every batch
in training mode. A pretrained part that was meant to stay as it is drifts towards the new data, and its weights
no longer fit it.

It is a warning if the layer is in training mode. If it is in eval mode while other parameters of the model are
to be trained, it is only mentioned (info): the next `model.train()` sets it going. A model that wants no
gradient and is in eval mode is one for inference, and no finding; nor is a layer without weight and bias, with
momentum 0, or frozen by `batchnorm.freeze`.

## How it comes about

Fine-tuning by `for p in backbone.parameters(): p.requires_grad = False`; adapters (LoRA), whose file then holds
what was trained and not the statistics that moved.

## What to do

- `batchnorm.freeze(model, inplace=True)`, or of the part: statistics stay through `model.train()`. `findings.fix()`
  freezes the statistics of just these layers.
- If the statistics are to follow the new data, with the weights as they are: that is what
  `batchnorm.recalibrate` does, once and exactly.
"""

from collections.abc import Iterator

from batchnorm.checks._words import code_for, count, parts
from batchnorm.checks.evidence import Evidence, Layer
from batchnorm.checks.finding import Finding
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN010"]


@rule(
    "BN010",
    "frozen weights with live statistics",
    "warning",
    needs=["model"],
    reference="https://github.com/huggingface/peft/issues/1732",
)
def BN010(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """One finding, with a line of code for every part."""
    half = [each for each in evidence.layers if _half_frozen(each)]
    moving = [each for each in half if each.training]
    names = [each.name for each in evidence.layers]
    if moving:
        yield _told(self, moving, names, "and every batch in training mode moves their running statistics")
    elif half and evidence.learns:
        told = "and model.train() would set their running statistics moving"
        yield _told(self, half, names, told, severity="info")


def _told(self: Rule, layers: list[Layer], names: list[str], what: str, **options: str) -> Finding:
    where = parts((each.name for each in layers), names)
    code = "; ".join(f"batchnorm.freeze({code_for(part)}, inplace=True)" for part in where[:3])
    return self.finding(
        layers[0].name,
        f"weight and bias of {count(len(layers), 'batch norm')} of {len(names)} require no gradient, {what}",
        cause="requires_grad=False keeps parameters; running mean and variance are buffers",
        fix=code if len(where) <= 3 else "batchnorm.freeze(part, inplace=True) for every frozen part",
        evidence={"layers": len(layers), "of": len(names)},
        also=tuple(each.name for each in layers[1:]),
        **options,
    )


def _half_frozen(layer: Layer) -> bool:
    affine = layer.weight is not None or layer.bias is not None
    trained = layer.weight_trained or layer.bias_trained
    moves = layer.mean is not None and layer.tracks and not layer.frozen and layer.momentum != 0
    return affine and not trained and moves
