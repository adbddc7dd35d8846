"""What mends a rule's findings without a change of what the network computes in eval mode, for the rules that have it.

A mend only says what is to become of a layer, or why it may not; `_fix.py` carries out all that is to become of it at
once, so that one undoing takes all of it back.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from batchnorm.checks._timing import OURS
from batchnorm.nn.batch_norm import Extras
from batchnorm.nn.families import FAMILIES, family_of
from batchnorm.nn.frozen import Frozen
from batchnorm.surgery._convert import new_class

__all__ = ["HALF", "MENDS", "Left", "Wish"]

HALF = (torch.float16, torch.bfloat16)
_USUAL_MOMENTUM = 0.1


@dataclass
class Wish:
    """What is to become of one layer."""

    module: Any  # a batch norm, as it stands
    to: str = ""  # the family of this package that it shall be of
    backend: str = ""
    frozen: bool = False  # its statistics
    momentum: float | None = None
    wide: bool = False  # what is in half precision, in float32

    @property
    def ours(self) -> bool:
        """Whether it will be a layer of this package, which takes parameters and buffers of different dtypes."""
        return bool(self.to) or isinstance(self.module, Extras)

    def replaced(self) -> dict[str, torch.Tensor]:
        """The tensors that widening replaces, by their names in the layer."""
        if not self.wide:
            return {}
        found = {name: self.module._buffers.get(name) for name in ("running_mean", "running_var")}
        found |= {} if self.ours else self.module._parameters
        return {name: each for name, each in found.items() if each is not None and each.dtype in HALF}


@dataclass(frozen=True)
class Left:
    """Why a layer is not mended."""

    why: str


Mend = Callable[[Wish, Mapping[str, Any]], str | Left]  # (of the finding its evidence); what is done


def _wider(wish: Wish, evidence: Mapping[str, Any]) -> str | Left:
    """BN003: the running statistics in float32."""
    wish.wide = True
    if wish.replaced():
        return "running statistics kept in float32"
    wish.wide = False
    return Left("they are in float32 by now")


def _momentum(wish: Wish, evidence: Mapping[str, Any]) -> str | Left:
    """BN004: the weight of the new batch, as PyTorch has it."""
    if wish.module.momentum != evidence.get("momentum"):
        return Left("its momentum is another one by now")
    momentum = round(1 - float(wish.module.momentum), 12)
    if momentum <= 0:
        return Left(f"1 − {wish.module.momentum:g} would freeze the statistics")
    if momentum >= wish.module.momentum:
        return Left("1 − 0.5 is the same")
    wish.momentum = momentum
    return f"momentum is {momentum:g} now; left to you: batchnorm.recalibrate(model, loader)"


def _frozen(wish: Wish, evidence: Mapping[str, Any]) -> str | Left:
    """BN010: statistics that stay, as weight and bias do."""
    if isinstance(wish.module, Frozen):
        return Left("its statistics are frozen by now")
    for parameter in (wish.module.weight, wish.module.bias):
        if parameter is not None and parameter.requires_grad:
            return Left("its weight or bias is trained by now")
    wish.frozen = True
    return "statistics frozen, as weight and bias are"


def _average(wish: Wish, evidence: Mapping[str, Any]) -> str | Left:
    """BN015: a layer that compiles, or PyTorch's usual momentum."""
    if wish.module.momentum is not None:
        return Left("it has a momentum by now")
    if evidence.get("compiled"):
        return _become(wish, "batchnorm", "this package's layer, which compiles")
    wish.momentum = _USUAL_MOMENTUM
    return f"momentum is {_USUAL_MOMENTUM:g} now; the statistics are the average still"


def _synchronized(wish: Wish, evidence: Mapping[str, Any]) -> str | Left:
    """BN016: the statistics of all processes, where these have enough samples."""
    if evidence.get("to") != "sync":
        return Left("all processes together have few samples, too")
    if wish.to or wish.backend:
        return Left("BN112 comes first: mend that and check again")
    return _become(wish, "sync", "synchronized: every process needs this change before training")


def _counted_once(wish: Wish, evidence: Mapping[str, Any]) -> str | Left:
    """BN105: a layer that does not count a recomputation."""
    if evidence.get("cause") != "recomputation":
        return Left("the model calls it several times")
    if evidence.get("forward") != 1:
        return Left("the model calls it several times a forward, besides the recomputation")
    return _become(wish, "batchnorm", "this package's layer, which does not count a recomputation")


def _faster(wish: Wish, evidence: Mapping[str, Any]) -> str | Left:
    """BN109: this package's layer, where that alone is the fastest way."""
    if evidence.get("faster") != OURS:
        return Left("the layout is one of the whole model and its input")
    return _become(wish, "batchnorm", "this package's layer, the fastest here")


def _right(wish: Wish, evidence: Mapping[str, Any]) -> str | Left:
    """BN112: what has passed the self-test."""
    instead = evidence.get("instead")
    if instead == "batchnorm":
        return _become(wish, "batchnorm", "this package's layer, which is right here")
    if instead != "reference":
        return Left("this package's layers are wrong here, too")
    told = "this package's layer with backend='reference', which is right here, and slow"
    if not isinstance(wish.module, Extras):
        done = _become(wish, "batchnorm", told)
        if isinstance(done, Left):
            return done
    wish.backend = "reference"
    return told


MENDS: dict[str, Mend] = {
    "BN003": _wider,
    "BN004": _momentum,
    "BN010": _frozen,
    "BN015": _average,
    "BN016": _synchronized,
    "BN105": _counted_once,
    "BN109": _faster,
    "BN112": _right,
}


def _become(wish: Wish, to: str, told: str) -> str | Left:
    """Make it a layer of this package, if it is nothing but a batch norm; one that is synchronized stays so."""
    found = family_of(type(wish.module))
    if to == "batchnorm" and isinstance(wish.module, Extras):
        return Left("it is this package's layer already")
    synchronized = "sync" in (to, wish.to) or (found is not None and found[0].name == "torch-sync")
    family = FAMILIES["sync" if synchronized else "batchnorm"]
    new, reason = new_class(wish.module, family, 0, ())
    if new is None:
        return Left(reason)
    wish.to = family.name
    return told
