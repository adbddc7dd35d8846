"""How many kinds of samples a batch has, against batches that were dealt out at random: a pure function of counts."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Variety", "variety"]

_DEALS = 100
_CERTAIN = 5.0  # as of the means of batches


@dataclass(frozen=True)
class Variety:
    """How much of the labels' variety single batches have."""

    classes: int
    held: float  # classes in a batch, on average
    chance: float  # the same, if all labels are dealt out at random
    share: float  # of pairs of samples with different labels: in a batch over in all batches; 1 for shuffled ones
    certainty: float  # of fewer such pairs than by chance, in standard deviations
    batches: int

    @property
    def sure(self) -> bool:
        """Whether chance is out of the question."""
        return self.certainty >= _CERTAIN


def variety(counts: Tensor, enough: float = 1.0) -> Variety | None:
    """What `counts` (batches, classes) say of the order of the samples; None if batches have `enough` variety or more.

    Two samples of a batch are of different classes as often as any two are, where the batches were dealt out at random
    (Simpson's index, 1949, without replacement). How far fewer such pairs are from chance is told by a hundred deals.
    """
    sizes = counts.sum(1)
    total, pairs = int(sizes.sum()), int((sizes * (sizes - 1)).sum())
    every = total * (total - 1) - _alike(counts.sum(0))
    if len(counts) < 2 or not pairs or not every:
        return None
    alike = _alike(counts)
    share = (1 - alike / pairs) / (every / (total * (total - 1)))
    if share >= enough:
        return None
    batches, classes = counts.shape
    labels = torch.arange(classes).repeat_interleave(counts.sum(0))
    places = torch.arange(batches).repeat_interleave(sizes) * classes
    random = torch.Generator().manual_seed(0)
    dealt, held = [], []
    for _ in range(_DEALS):
        order = torch.randperm(total, generator=random)
        deal = (places + labels[order]).bincount(minlength=counts.numel()).view_as(counts)
        dealt.append(float(_alike(deal)))
        held.append(float((deal > 0).sum()) / batches)
    usual = torch.tensor(dealt, dtype=torch.float64)
    spread = max(float(usual.std()), 1.0)
    return Variety(
        classes,
        float((counts > 0).sum()) / batches,
        sum(held) / _DEALS,
        share,
        (alike - float(usual.mean())) / spread,
        batches,
    )


def _alike(counts: Tensor) -> int:
    """Ordered pairs of samples with one label."""
    return int((counts * (counts - 1)).sum())
