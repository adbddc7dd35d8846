"""Labels beside the inputs: how many of each a batch has."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from batchnorm.stats._batches import samples_in

__all__ = ["labels_of"]

# Batches that are counted, from the first to the last: more say nothing new of their order.
_MOST = 64
# Values of which most are there once or twice are numbers of samples, not of classes.
_EACH = 2


def labels_of(batches: Iterable[Any], taken: Sequence[Any]) -> Tensor | None:
    """Counts (batches, classes) of each label in a batch; None where batches are not of an input and its labels.

    Where a loader goes through its data in their order, and the labels of all of them are at hand, they are those of
    the whole loader: a sorted file may show one class in its first batches.
    """
    found = [_beside(batch) for batch in taken]
    seen = [each for each in found if each is not None]
    if len(seen) < len(found):
        return None
    if (every := _in_order(batches, seen)) is not None:
        seen = every
    if len(seen) > _MOST:
        seen = [seen[place * (len(seen) - 1) // (_MOST - 1)] for place in range(_MOST)]
    together = torch.cat(seen)
    classes, places = together.unique(return_inverse=True)
    if _EACH * len(classes) > len(together):
        return None
    parts = places.split([len(each) for each in seen])
    return torch.stack([part.bincount(minlength=len(classes)) for part in parts])


def _beside(batch: Any) -> Tensor | None:
    """The labels of a pair of an input and whole numbers, one a sample."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        return None
    return _whole_numbers(batch[1], samples_in(batch[0]))


def _whole_numbers(value: Any, count: int | None) -> Tensor | None:
    if not isinstance(value, Tensor) or value.dim() != 1 or len(value) != count:
        return None
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        return None
    return value.detach().cpu().long()


def _in_order(batches: Iterable[Any], seen: Sequence[Tensor]) -> list[Tensor] | None:
    """The labels of every batch of a loader that does not shuffle, where its dataset has them ready."""
    if not isinstance(batches, DataLoader) or type(batches.sampler) is not SequentialSampler:
        return None
    data, size = batches.dataset, batches.batch_size
    if size is None or type(batches.batch_sampler) is not BatchSampler:
        return None
    known = data.tensors[1:2] if isinstance(data, TensorDataset) else (getattr(data, "targets", None),)
    every = _every(known[0], data) if known else None
    # What the loader gave tells whether these are its labels, and in this order.
    given = torch.cat(list(seen))
    if every is None or not torch.equal(every[: len(given)], given):
        return None
    return list((every[: len(every) // size * size] if batches.drop_last else every).split(size))


def _every(targets: Any, data: Any) -> Tensor | None:
    """Targets as they are kept: a tensor, an array or a list of whole numbers."""
    if targets is None:
        return None
    try:
        return _whole_numbers(torch.as_tensor(targets), len(data))
    except (TypeError, ValueError, RuntimeError):  # words, boxes, lists of several lengths
        return None
