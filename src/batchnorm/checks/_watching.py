"""Hooks before every batch norm, which note what each call brings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.checks._padding import padded_share
from batchnorm.checks.evidence import Call, Seen
from batchnorm.stats._moments import batch_pool
from batchnorm.stats._passes import seen_by
from batchnorm.stats._still import Still

__all__ = ["Norms", "Watch"]

Norms = Sequence[tuple[str, _BatchNorm]]


@dataclass
class _Notes:
    """What is written down of one layer."""

    calls: dict[str, list[Call]] = field(default_factory=lambda: {"train": [], "eval": []})
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    channels_last: bool = False
    training: bool = True
    padding: list[float] = field(default_factory=list)
    updates_forward: int | None = None
    updates_step: int | None = None


class Watch:
    """Notes of every layer, while a mode is set; with None nothing is noted."""

    def __init__(self, norms: Norms, still: Still) -> None:
        self.norms = norms
        self.notes = {name: _Notes() for name, _ in norms}
        self.mode: Literal["train", "eval"] | None = None
        self.batch = 0
        self._sites: dict[str, int] = {}
        for name, module in norms:
            hook = self._hook(name, module.num_features)
            still.keep(module.register_forward_pre_hook(hook, with_kwargs=True))

    def begin(self, batch: int, mode: Literal["train", "eval"] | None) -> None:
        """Another batch follows."""
        self.batch, self.mode = batch, mode
        self._sites = dict.fromkeys(self.notes, 0)

    def counters(self) -> dict[str, int | None]:
        """num_batches_tracked of every layer now."""
        found = {name: module._buffers.get("num_batches_tracked") for name, module in self.norms}
        return {name: None if counter is None else int(counter) for name, counter in found.items()}

    def seen(self) -> dict[str, Seen]:
        """All notes, of the layers that were called."""
        return {
            name: Seen(
                train=tuple(notes.calls["train"]),
                eval=tuple(notes.calls["eval"]),
                shape=notes.shape,
                dtype=notes.dtype,
                channels_last=notes.channels_last,
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
            if self.mode is None:
                return
            seen = seen_by(layer, channels, args, kwargs)
            if seen is None or not seen[0].numel():
                return
            input, mask = seen
            if not notes.shape:
                notes.shape, notes.dtype = tuple(input.shape), input.dtype
                notes.channels_last = input.dim() > 2 and not input.is_contiguous()
            if self.mode == "train":
                notes.training = layer.training
                notes.padding.append(0.0 if mask is not None else padded_share(input))
            notes.calls[self.mode].append(_call(self.batch, self._sites[name], input, mask))
            self._sites[name] += 1

        return observe


def _call(batch: int, site: int, input: Tensor, mask: Tensor | None) -> Call:
    values, samples = batch_pool(input, mask)
    n = input.shape[0]
    spread = samples.m2 / samples.count.clamp(min=torch.finfo(torch.float64).tiny)
    return Call(
        batch,
        site,
        n,
        input.shape[2:].numel(),
        values.mean.cpu(),
        values.biased_var.cpu(),
        (spread * n / max(1, n - 1)).cpu(),
    )
