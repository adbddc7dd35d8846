"""A layer holds an activation, or another module, that a conversion by another library would drop.

PyTorch's `convert_sync_batchnorm`, and converters like it, make a new layer of the few attributes that they know. A
module inside the old one is carried along and never called, without a word, and the network is another one: one
report has F1 fall from 0.82 to 0.

The layers of this package that hold an activation refuse such a conversion by PyTorch; a layer of another
package with modules inside (timm's BatchNormAct2d) cannot. `nn.Identity` inside is nothing.

## What to do

- `batchnorm.convert(model, "sync")` keeps what a layer of this package holds, and skips what it does not know.
- For timm's layers: `timm.layers.convert_sync_batchnorm`.
"""

from collections.abc import Iterator

from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding
from batchnorm.checks.rule import Rule, rule

__all__ = ["BN019"]


@rule(
    "BN019",
    "activation held in a layer",
    "info",
    needs=["model"],
    reference="https://github.com/pytorch/pytorch/issues/187298",
)
def BN019(self: Rule, evidence: Evidence) -> Iterator[Finding]:  # noqa: N802 - named as its code
    """Whatever `torch.nn.SyncBatchNorm.convert_sync_batchnorm` does not copy."""
    for layer in evidence.layers:
        if layer.holds:
            refuses = "; this package's layers refuse PyTorch's" if layer.ours else ""
            yield self.finding(
                layer.name,
                f"it holds {' and '.join(layer.holds)}, which a conversion by another library would drop{refuses}",
                cause="convert_sync_batchnorm and its kin make a new layer of the attributes that they know",
                fix='batchnorm.convert(model, "sync")'
                if layer.ours
                else "the conversion of the layer's own package",
                evidence={"holds": list(layer.holds)},
            )
