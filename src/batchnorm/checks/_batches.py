"""Batches run through a model in training and in eval mode, and what follows. The model is afterwards as it was."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from batchnorm._errors import DataError, message
from batchnorm.checks._watching import Norms, Watch
from batchnorm.checks.evidence import Fed, Run, Seen
from batchnorm.stats._batches import Forward, call, check_loader, place_of, samples_in
from batchnorm.stats._still import Still, plainly

__all__ = ["observe"]

Mode = Literal["train", "eval"]


def observe(
    model: nn.Module,
    norms: Norms,
    batches: Iterable[Any],
    forward: Forward | None,
    most: int,
    told: Callable[[int], None],
) -> tuple[dict[str, Seen], Run]:
    """Run up to `most` batches; `told` hears how many forwards are done.

    Raises:
        InputTypeError: `batches` is no iterable of batches.
        DataError: no batch, or one that the model does not take.
    """
    check_loader(batches, "check", again=False)
    taken = list(itertools.islice(batches, most + 1))
    if not taken:
        raise DataError(message("check: batches", got="none", expected="at least one batch"))
    whole, taken = len(taken) <= most, taken[:most]
    device = place_of(model)
    cuda = [device] if device is not None and device.type == "cuda" else []
    with Still(model, tuple(model.parameters())) as still, torch.random.fork_rng(devices=cuda):
        for parameter in model.parameters():
            parameter.grad = None  # a backward would add to the one that is there
        runs = _Runs(model, Watch(norms, still), forward, device, told)
        still.keep(model.register_forward_hook(runs.note_output))
        runs.step(taken[0])
        with plainly(grad=False):
            gap = tuple(runs.both_modes(index, batch) for index, batch in enumerate(taken))
            in_eval, in_training = runs.neighbours(taken[0])
    fed = tuple(Fed(samples_in(batch) or 0) for batch in taken)
    known = tuple(value for value in gap if value is not None)
    pairs = all(_is_pair(batch) for batch in taken)
    return runs.watch.seen(), Run(fed, whole, in_eval, in_training, known, pairs)


class _Runs:
    """One model, its watch, and the ways to run it."""

    def __init__(
        self,
        model: nn.Module,
        watch: Watch,
        forward: Forward | None,
        device: torch.device | None,
        told: Callable[[int], None],
    ) -> None:
        self.model, self.watch, self.forward, self.device = model, watch, forward, device
        self._told, self._done = told, 0
        self._output: Tensor | None = None
        self._drops = any(_drops(module) for module in model.modules())

    def note_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook of the model: its first floating-point output with a sample a row."""
        leaves = (each for each in tree_leaves(output) if isinstance(each, Tensor))
        self._output = next((each for each in leaves if each.is_floating_point() and each.dim()), None)

    def run(self, batch: Any, index: int, mode: Mode, *, noted: bool, dropout: bool = True) -> Tensor | None:
        """The model's output in a mode; the same random numbers for the same batch."""
        # The model's own train(), which may leave layers in eval mode on purpose.
        self.model.train(mode == "train")
        if not dropout:
            for module in self.model.modules():
                if _drops(module):
                    module.training = False
        self.watch.begin(index, mode if noted else None)
        self._output = None
        torch.manual_seed(index)
        try:
            call(self.model, batch, self.forward, self.device)
        except (DataError, KeyboardInterrupt):
            raise
        except Exception as error:  # whatever the user's model raises
            raise DataError(
                message(
                    f"check: batch {index + 1} in {mode} mode",
                    got=f"{type(error).__name__}: {error}",
                    expected="a batch that the model takes",
                    fix="If it is called another way: forward=lambda model, batch: model(...).",
                )
            ) from error
        self._done += 1
        self._told(self._done)
        return self._output

    def step(self, batch: Any) -> None:
        """One forward and backward in training mode, as a checkpoint would see it: how often each layer counts."""
        before = self.watch.counters()
        with plainly(grad=True):
            output = self.run(batch, 0, "train", noted=False)
            after = self.watch.counters()
            if output is not None and output.requires_grad:
                output.backward(torch.randn_like(output))
        at_last = self.watch.counters()
        for name, notes in self.watch.notes.items():
            start, forward, end = before[name], after[name], at_last[name]
            if start is not None and forward is not None and end is not None:
                notes.updates_forward, notes.updates_step = forward - start, end - start

    def both_modes(self, index: int, batch: Any) -> float | None:
        """One batch in training and in eval mode: how far the outputs are apart, without dropout, in their spread."""
        trained = self.run(batch, index, "train", noted=True)
        evaluated = self.run(batch, index, "eval", noted=True)
        if self._drops:
            trained = self.run(batch, index, "train", noted=False, dropout=False)
        return _distance(trained, evaluated)

    def neighbours(self, batch: Any) -> tuple[float | None, float | None]:
        """How far the outputs of half a batch move when the other half is not there: in eval, and in training."""
        size = samples_in(batch) or 0
        half = size // 2
        if half < 2:
            return None, None
        part = _first(batch, half, size)
        found = []
        for mode in ("eval", "train"):
            whole = self.run(batch, 0, mode, noted=False, dropout=False)
            alone = self.run(part, 0, mode, noted=False, dropout=False)
            fits = (
                whole is not None
                and alone is not None
                and whole.shape[:1] == (size,)
                and alone.shape[:1] == (half,)
            )
            found.append(_distance(alone, whole[:half]) if fits and whole is not None else None)
        return found[0], found[1]


def _drops(module: nn.Module) -> bool:
    return isinstance(module, _DropoutNd) or type(module).__name__ in (
        "DropPath",
        "StochasticDepth",
        "DropBlock2d",
    )


def _distance(a: Tensor | None, b: Tensor | None) -> float | None:
    """Root mean square of a − b over that of b about its mean over the samples; None if it cannot be told."""
    if a is None or b is None or a.shape != b.shape or a.shape[0] < 2:
        return None
    x, y = a.detach().flatten(1).double(), b.detach().flatten(1).double()
    spread = (y - y.mean(0)).square().mean().sqrt()
    distance = (x - y).square().mean().sqrt()
    if not distance.isfinite() or not spread.isfinite():
        return None
    return float(distance / spread) if spread > 0 else (0.0 if distance == 0 else float("inf"))


def _first(value: Any, half: int, size: int) -> Any:
    """The first samples of everything in a batch that has a row a sample."""
    if isinstance(value, Tensor):
        return value[:half] if value.dim() and value.shape[0] == size else value
    if isinstance(value, Mapping):
        return {key: _first(item, half, size) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_first(item, half, size) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_first(item, half, size) for item in value)
    return value


def _views(batch: Any) -> Iterator[Tensor]:
    parts = batch.values() if isinstance(batch, Mapping) else batch
    if isinstance(batch, Mapping | tuple | list):
        for part in parts:
            if isinstance(part, Tensor):
                yield part
            elif isinstance(part, tuple | list):
                yield from _views(part)


def _is_pair(batch: Any) -> bool:
    """Whether a batch is two or more views of the same samples: float tensors of one shape, which differ."""
    views = [each for each in _views(batch) if each.is_floating_point() and each.dim() > 1]
    return len(views) > 1 and all(each.shape == views[0].shape for each in views)
