"""One look: what every layer gets in one step, and how it stands then."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from batchnorm.checks._cells import samples_of
from batchnorm.checks._host import on_host
from batchnorm.checks._state import layers_of_model, norms_of
from batchnorm.checks._watching import Watch
from batchnorm.checks.evidence import Call, Layer, Seen

__all__ = ["Look", "Looking"]

# Of a step: one that does not end would keep what every forward brings.
_FORWARDS = 64


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
        self._counts: list[_Counted] = []  # before and behind each forward
        self._backward: list[_Counted] = []  # and each backward
        self._backward_from: dict[str, Tensor] | None = None  # one is on
        self._over = False

    @property
    def full(self) -> bool:
        """Whether it has as many forwards as one look takes."""
        return len(self._counts) >= _FORWARDS

    def begin(self, args: Any, kwargs: Any) -> None:
        """The model is called in training mode."""
        if not self._watch.norms or self.full:
            return
        self._watch.samples = samples_of(args, kwargs)
        self._watch.note_inputs(self._model, args, kwargs)
        self._before = self._counters()
        self._watch.mode, self._watch.thread = "train", threading.get_ident()
        self._handles += self._watch.hang()

    def end(self, output: Any = None) -> None:
        """The forward is over, or has failed."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._watch.mode is not None:
            self._counts.append((self._before, self._counters()))
            self._watch.mode = None
            # What moves a counter in backward is a forward that is computed again; anything else that moves it behind
            # the forward is one that the loop has run.
            nodes = {each.grad_fn for each in tree_leaves(output) if isinstance(each, Tensor)}
            for node in nodes - {None}:
                node.register_prehook(self._backward_begins)  # type: ignore[union-attr]

    def _backward_begins(self, gradients: Any) -> None:
        """A backward pass has reached the model."""
        if not self._over and self._backward_from is None:
            self._backward_from = self._counters()
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ends)

    def _backward_ends(self) -> None:
        before, self._backward_from = self._backward_from, None
        if before is not None:
            self._backward.append((before, self._counters()))

    def finish(self, *, whole: bool = True) -> Look:
        """The step is over: bring everything to the CPU. Of one that is not `whole` calls say nothing."""
        self.end()
        self._backward_ends()  # an optimizer may step within
        self._over = True
        seen = self._watch.seen() if whole else {}
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
        pairs = [*self._counts, *self._backward]
        read = on_host([reading[name] for name in names for pair in pairs for reading in pair])
        forwards, found = len(self._counts), {}
        for place, name in enumerate(names):
            own = [int(value) for value in read[2 * place * len(pairs) : 2 * (place + 1) * len(pairs)]]
            moved = [after - before for before, after in zip(own[::2], own[1::2], strict=True)]
            forward, step = sum(moved[:forwards]), sum(moved)
            # Several forwards in the step: what each of them did, if they are alike.
            if forward % forwards == 0:
                found[name] = forward // forwards, step // forwards if step % forwards == 0 else None
        return found


_Counted = tuple[dict[str, Tensor], dict[str, Tensor]]  # num_batches_tracked before and after
