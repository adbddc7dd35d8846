"""Hooks before every batch norm, which note what each call brings."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from batchnorm.checks._ear import Ear
from batchnorm.checks._host import on_host
from batchnorm.checks._padding import padded_share
from batchnorm.checks.evidence import Call, Seen
from batchnorm.stats._moments import batch_pool
from batchnorm.stats._passes import seen_by

__all__ = ["Norms", "Watch"]

Norms = Sequence[tuple[str, _BatchNorm]]


@dataclass
class _Notes:
    """What is written down of one layer."""

    calls: dict[str, list[Call]] = field(default_factory=lambda: {"train": [], "eval": []})
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    channels_last: bool = False
    place: int = 0
    raw: bool = False
    training: bool = True
    batch_in_eval: bool = False
    padding: list[float] = field(default_factory=list)
    updates_forward: int | None = None
    updates_step: int | None = None


class Watch:
    """Notes of every layer, while a mode is set; with None nothing is noted. The numbers stay on their device."""

    def __init__(self, norms: Norms) -> None:
        self.norms = norms
        self.notes = {name: _Notes() for name, _ in norms}
        self.mode: Literal["train", "eval"] | None = None
        self.batch = 0
        self.samples = 0
        self._sites: dict[str, int] = {}
        self._given: set[int] = set()
        self._reached = 0
        self.thread: int | None = None  # whose calls are meant, if not those of all

    def hang(self) -> list[RemovableHandle]:
        """Put the hooks on; taking them away is the caller's."""
        return [
            module.register_forward_pre_hook(Ear(self._hook(name, module.num_features)), with_kwargs=True)
            for name, module in self.norms
        ]

    def begin(self, batch: int, mode: Literal["train", "eval"] | None, samples: int) -> None:
        """Another batch follows, of so many samples."""
        self.batch, self.mode, self.samples = batch, mode, samples
        self._sites = dict.fromkeys(self.notes, 0)

    def note_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A forward pre-hook of the model: the tensors that it is given."""
        self._given = {each.data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}

    def counters(self) -> dict[str, int | None]:
        """num_batches_tracked of every layer now."""
        found = {name: module._buffers.get("num_batches_tracked") for name, module in self.norms}
        return {name: None if counter is None else int(counter) for name, counter in found.items()}

    def seen(self) -> dict[str, Seen]:
        """All notes, of the layers that were called, brought to the CPU in one go."""
        calls = [call for notes in self.notes.values() for each in notes.calls.values() for call in each]
        numbers = iter(on_host([part for call in calls for part in (call.mean, call.var, call.between)]))
        moved = {
            id(call): replace(call, mean=next(numbers), var=next(numbers), between=next(numbers))
            for call in calls
        }
        return {
            name: Seen(
                train=tuple(moved[id(call)] for call in notes.calls["train"]),
                eval=tuple(moved[id(call)] for call in notes.calls["eval"]),
                shape=notes.shape,
                dtype=notes.dtype,
                channels_last=notes.channels_last,
                place=notes.place,
                raw=notes.raw,
                batch_in_eval=notes.batch_in_eval,
                training=notes.training,
                updates_forward=notes.updates_forward,
                updates_step=notes.updates_step,
                padding=sum(notes.padding) / len(notes.padding) if notes.padding else 0.0,
            )
            for name, notes in self.notes.items()
            if notes.shape
        }

    def _hook(self, name: str, channels: int) -> Callable[[nn.Module, Any, Any], None]:
        notes = self.notes[name]

        def observe(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.mode is None or self.thread not in (None, threading.get_ident()):
                return
            seen = seen_by(layer, channels, args, kwargs)
            if seen is None or not seen[0].numel():
                return
            input, mask = seen
            if not notes.shape:
                notes.shape, notes.dtype = tuple(input.shape), input.dtype
                notes.channels_last = _is_channels_last(input)
                notes.place, self._reached = self._reached, self._reached + 1
                notes.raw = input.data_ptr() in self._given
            by_batch = layer.training or getattr(layer, "running_mean", None) is None
            if self.mode == "train":
                notes.training = by_batch
                notes.padding.append(0.0 if mask is not None else padded_share(input, self.samples))
            else:
                notes.batch_in_eval = notes.batch_in_eval or by_batch
            notes.calls[self.mode].append(_call(self.batch, self._sites[name], input, mask))
            self._sites[name] += 1

        return observe


def _is_channels_last(input: Tensor) -> bool:
    if input.dim() not in (4, 5) or input.is_contiguous():
        return False
    return input.is_contiguous(
        memory_format=torch.channels_last if input.dim() == 4 else torch.channels_last_3d
    )


def _call(batch: int, site: int, input: Tensor, mask: Tensor | None) -> Call:
    values, samples = batch_pool(input, mask)
    n = input.shape[0]
    spread = samples.m2 / samples.count.clamp(min=torch.finfo(torch.float64).tiny)
    return Call(
        batch,
        site,
        n,
        input.shape[2:].numel(),
        values.mean,
        values.biased_var,
        spread * n / max(1, n - 1),
    )
