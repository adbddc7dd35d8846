"""What batches and their loader say about themselves, without the model being run."""

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

__all__ = ["holds_pairs", "last_size", "replaced"]


def last_size(batches: Iterable[Any]) -> int | None:
    """Samples of a DataLoader's last batch; None where it cannot be told without loading everything."""
    if not isinstance(batches, DataLoader) or isinstance(batches.dataset, IterableDataset):
        return None
    size, sampler = batches.batch_size, batches.sampler
    if size is None or not isinstance(sampler, Sized) or not len(sampler):
        return None
    rest = len(sampler) % size
    return size if batches.drop_last or not rest else rest


def replaced(value: Any, rows: Tensor) -> Any:
    """The batch with other samples in some places: row i becomes row `rows[i]`, in everything with a row a sample."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.dim() and value.shape[0] == len(rows) else value
    if isinstance(value, Mapping):
        return {key: replaced(item, rows) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(replaced(item, rows) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(replaced(item, rows) for item in value)
    return value


def holds_pairs(model: nn.Module, batch: Any, called_by_user: bool) -> bool:
    """Whether a batch has two views of each sample and the model gets both.

    An input and a target of its shape (images to images) are no such pair: the model is given the first alone. So the
    views have to be together in the batch's first element, or be arguments of the model's forward by name.
    """
    if isinstance(batch, Mapping):
        known = inspect.signature(model.forward).parameters
        given = batch.values() if called_by_user else [batch[key] for key in batch if str(key) in known]
        return _alike(list(_tensors(list(given))))
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], tuple | list):
        return _alike(list(_tensors(batch[0])))
    return called_by_user and isinstance(batch, tuple | list) and _alike(list(_tensors(batch)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)


def _alike(tensors: list[Tensor]) -> bool:
    """Two float tensors of one shape, whose rows belong together: each is nearer to its own partner than to others."""
    views = [each for each in tensors if each.is_floating_point() and each.dim() > 1]
    for first, second in itertools.pairwise(views):
        if first.shape != second.shape or first.shape[0] < 2 or torch.equal(first, second):
            continue
        a, b = first.detach().double().flatten(1), second.detach().double().flatten(1)
        a, b = a - a.mean(0), b - b.mean(0)
        # Products of the rows of one with the rows of the other: partners are on the diagonal.
        product = a @ b.T
        scale = (a.square().sum(1).sqrt().unsqueeze(1) * b.square().sum(1).sqrt()).clamp(min=1e-300)
        alike = (product / scale).diagonal()
        rest = (product / scale - torch.diag(alike)).sum() / (product.numel() - len(alike))
        if alike.mean() - rest > _PARTNERS:
            return True
    return False


# Correlation of partners beyond that of strangers. Crops and flips of one photograph: 0.2 to 0.9; unrelated tensors of
# noise: 0.00 ± 0.03.
_PARTNERS = 0.15
