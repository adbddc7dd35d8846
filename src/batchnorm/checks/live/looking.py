"""One look: what every layer gets in one step, and how it stands then."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from batchnorm.checks._cells import cells, samples_of
from batchnorm.checks._host import on_host
from batchnorm.checks._state import layers_of_model, norms_of
from batchnorm.checks._watching import Watch
from batchnorm.checks.evidence import Call, Layer, Seen

__all__ = ["Look", "Looking", "cells"]


@dataclass(frozen=True, eq=False)
class Look:
    """A step that was looked at."""

    step: int
    layers: tuple[Layer, ...]
    seen: Mapping[str, Seen]  # calls in training, as batch 0
    samples: int

    def calls(self, name: str) -> tuple[Call, ...]:
        """Of a layer, in training."""
        seen = self.seen.get(name)
        return () if seen is None else seen.train


class Looking:
    """A look that goes on: hooks are on the layers while the model's forward runs, and numbers stay on their device."""

    def __init__(self, model: nn.Module, step: int, *, calls: bool) -> None:
        self.step = step
        self._model = model
        self._watch = Watch(norms_of(model) if calls else ())
        self._watch.begin(0, None, 0)
        self._training = {name: module.training for name, module in norms_of(model)}
        self._handles: list[RemovableHandle] = []
        self._before: dict[str, Tensor] = {}
        self._counts: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []  # before and behind each forward

    def begin(self, args: Any, kwargs: Any) -> None:
        """The model is called in training mode."""
        if not self._watch.norms:
            return
        self._watch.samples = samples_of(args, kwargs)
        self._watch.note_inputs(self._model, args, kwargs)
        self._before = self._counters()
        self._watch.mode = "train"
        self._handles += self._watch.hang()

    def end(self) -> None:
        """The forward is over, or has failed."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._watch.mode is not None:
            self._counts.append((self._before, self._counters()))
            self._watch.mode = None

    def finish(self) -> Look:
        """The step is over: bring everything to the CPU."""
        seen = self._watch.seen()
        for name, (forward, step) in self._updates().items():
            if name in seen:
                seen[name] = replace(seen[name], updates_forward=forward, updates_step=step)
        layers = tuple(
            replace(layer, training=self._training.get(layer.name, layer.training))
            for layer in layers_of_model(self._model)
        )
        return Look(self.step, layers, seen, self._watch.samples)

    def _counters(self) -> dict[str, Tensor]:
        counters = {name: module._buffers.get("num_batches_tracked") for name, module in self._watch.norms}
        return {name: counter.clone() for name, counter in counters.items() if counter is not None}

    def _updates(self) -> dict[str, tuple[int, int | None]]:
        """Of num_batches_tracked in one forward, and in one forward and its backward."""
        if not self._counts:
            return {}
        names = list(self._counts[0][0])
        readings = [*(part for pair in self._counts for part in pair), self._counters()]
        read = on_host([reading[name] for name in names for reading in readings])
        count, forwards, found = len(readings), len(self._counts), {}
        for place, name in enumerate(names):
            own = [int(value) for value in read[place * count : (place + 1) * count]]
            forward = sum(own[2 * each + 1] - own[2 * each] for each in range(forwards))
            step = own[-1] - own[0]
            # Several forwards in the step: what each of them did, if they are alike.
            if forward % forwards == 0:
                found[name] = forward // forwards, step // forwards if step % forwards == 0 else None
        return found
