"""Batches run through a model in training and in eval mode, and what follows. The model is afterwards as it was."""

import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from batchnorm._errors import DataError, message
from batchnorm.checks._cells import cells, shape_of
from batchnorm.checks._host import on_host
from batchnorm.checks._labels import labels_of
from batchnorm.checks._loaders import holds_pairs, last_size, replaced
from batchnorm.checks._watching import Norms, Watch
from batchnorm.checks.evidence import Call, Fed, Run, Seen
from batchnorm.stats._batches import Forward, call, check_loader, place_of, samples_in, taken_as_input
from batchnorm.stats._still import Still, plainly

__all__ = ["forwards", "observe"]

Mode = Literal["train", "eval"]


def forwards(model: nn.Module, batches: int) -> int:
    """How many forwards `observe` makes of so many batches."""
    each = 3 if any(_drops(module) for module in model.modules()) else 2
    return each * batches + 2 * len(_MODES) + 1


def observe(
    model: nn.Module,
    norms: Norms,
    batches: Iterable[Any],
    forward: Forward | None,
    most: int,
    told: Callable[[int], None],
) -> tuple[dict[str, Seen], Run]:
    """Run up to `most` batches; `told` hears how many forwards are done.

    Every run starts from the buffers that the model came with: what one training-mode run does to the running
    statistics is not there in the next.

    Raises:
        InputTypeError: `batches` is no iterable of batches.
        DataError: no batch, or one that the model does not take.
    """
    check_loader(batches, "check", again=False, argument="batches")
    taken = list(itertools.islice(batches, most + 1))
    if not taken:
        raise DataError(message("check: batches", got="none", expected="at least one batch"))
    whole, taken = len(taken) <= most, taken[:most]
    sizes = [samples_in(batch) or 0 for batch in taken]
    device = place_of(model)
    cuda = [device] if device is not None and device.type == "cuda" else []
    with (
        Still(model, tuple(model.parameters())) as still,
        torch.random.fork_rng(devices=cuda),
        warnings.catch_warnings(),
    ):
        # Of a checkpoint that runs without gradients, as it does here.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad", UserWarning)
        runs = _Runs(model, Watch(norms), still, forward, device, told)
        with plainly(grad=False):
            gaps = [runs.both_modes(index, batch) for index, batch in enumerate(taken)]
            # The first batch that every layer takes; there is none if all are of one sample.
            usable = [index for index in range(len(taken)) if index not in runs.refused]
            in_eval, in_training = runs.neighbours(taken[usable[0]], usable[0]) if usable else (None, None)
        if usable:
            runs.step(taken[usable[0]], usable[0])
    fed = tuple(Fed(size, index in runs.refused) for index, size in enumerate(sizes))
    last = sizes[-1] if whole else last_size(batches)
    return runs.watch.seen(), Run(
        fed,
        whole,
        last,
        neighbours_eval=in_eval,
        neighbours_train=in_training,
        output=runs.output,
        output_dtype=runs.output_dtype,
        gap=tuple(value for value in gaps if value is not None),
        pairs=_mostly(holds_pairs(model, batch, forward is not None) for batch in taken),
        no_backward=runs.no_backward,
        inputs=_comparable(runs.inputs),
        labels=labels_of(batches, taken),
    )


class _Runs:
    """One model, its watch, and the ways to run it."""

    def __init__(
        self,
        model: nn.Module,
        watch: Watch,
        still: Still,
        forward: Forward | None,
        device: torch.device | None,
        told: Callable[[int], None],
    ) -> None:
        self.model, self.watch, self.still, self.forward, self.device = model, watch, still, forward, device
        self.refused: set[int] = set()  # batches
        self.inputs: list[tuple[tuple[int, ...], Call]] = []  # by batch, with the shape of a sample
        self.output: tuple[int, ...] = ()
        self.output_dtype: torch.dtype | None = None
        self.no_backward = ""
        self._told, self._done = told, 0
        self._output: Tensor | None = None
        self._drops = any(_drops(module) for module in model.modules())
        for handle in watch.hang():
            still.keep(handle)
        # Before the hooks of layers, one of which may be the model itself.
        still.keep(model.register_forward_pre_hook(self._note_input, prepend=True, with_kwargs=True))
        still.keep(model.register_forward_hook(self._note_output))

    def _note_input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A forward pre-hook of the model: what it is given, and of its first call for a batch the moments."""
        self.watch.note_inputs(module, args, kwargs)
        index = self.watch.batch
        if self.watch.mode != "eval" or any(call.batch == index for _, call in self.inputs):
            return
        # Views or frames that are laid out as samples are not independent.
        if (call := cells(args, kwargs)) is not None and call.samples == self.watch.samples:
            self.inputs.append((shape_of(args, kwargs), replace(call, batch=index)))

    def _note_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook of the model: its first floating-point output with a sample a row."""
        leaves = (each for each in tree_leaves(output) if isinstance(each, Tensor))
        self._output = next((each for each in leaves if each.is_floating_point() and each.dim()), None)

    def run(self, batch: Any, index: int, mode: Mode, *, noted: bool, dropout: bool = True) -> Tensor | None:
        """The model's output in a mode; the same random numbers and buffers for the same batch."""
        self.still.rewind()
        # The model's own train(), which may leave layers in eval mode on purpose.
        self.model.train(mode == "train")
        if not dropout:
            for module in self.model.modules():
                if _drops(module):
                    module.training = False
        size = samples_in(batch) or 0
        self.watch.begin(index, mode if noted else None, size)
        self._output = None
        torch.manual_seed(index)
        try:
            call(self.model, batch, self.forward, self.device)
        except (DataError, KeyboardInterrupt):
            raise
        except Exception as error:  # whatever the user's model raises
            if mode == "train" and isinstance(error, ValueError) and _ONE_VALUE in str(error):
                self.refused.add(index)
                return None
            said = " ".join(str(error).split()) or "no message"
            raise DataError(
                message(
                    f"check: batch {index + 1} in {mode} mode",
                    got=f"{type(error).__name__}: {said if len(said) <= _SAID else said[:_SAID] + ' ...'}",
                    expected="a batch that the model takes",
                    fix=("" if self.forward else taken_as_input(batch)) + _OTHERWISE,
                )
            ) from error
        self._done += 1
        self._told(self._done)
        return self._output

    def step(self, batch: Any, index: int) -> None:
        """One forward and backward in training mode, as a training step has them: how often each layer counts."""
        self.still.rewind()
        before = self.watch.counters()
        for parameter in self.model.parameters():
            # The model's own gradients are put back at the end; backward would add to them.
            parameter.grad = None
        with plainly(grad=True):
            output = self.run(batch, index, "train", noted=False)
            after = self.watch.counters()
            if output is not None and output.requires_grad:
                try:
                    output.backward(torch.randn_like(output))
                except (
                    RuntimeError
                ) as error:  # the model's own: what it did in between cannot be gone back through
                    self.no_backward = str(error).splitlines()[0]
        at_last = self.watch.counters()
        for name, notes in self.watch.notes.items():
            start, forward, end = before[name], after[name], at_last[name]
            if start is not None and forward is not None and end is not None:
                notes.updates_forward = forward - start
                notes.updates_step = None if self.no_backward else end - start

    def both_modes(self, index: int, batch: Any) -> float | None:
        """One batch in training and in eval mode: how far the outputs are apart, without dropout, in their spread."""
        trained = self.run(batch, index, "train", noted=True)
        evaluated = self.run(batch, index, "eval", noted=True)
        if evaluated is not None:
            self.output, self.output_dtype = tuple(evaluated.shape), evaluated.dtype
        if self._drops and index not in self.refused:
            trained = self.run(batch, index, "train", noted=False, dropout=False)
        return _gap(trained, evaluated)

    def neighbours(self, batch: Any, index: int) -> tuple[float | None, float | None]:
        """How far the outputs of half the samples move when the others are replaced: in eval, and in training.

        A random half takes the places of the other half, too: shapes and random numbers stay, and in training mode the
        batch's statistics become those of that half alone.
        """
        size = samples_in(batch) or 0
        half = size // 2
        if half < 2:
            return None, None
        kept = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:half].sort().values
        rows = kept[torch.arange(size) % half]
        rows[kept] = kept
        other = replaced(batch, rows)
        found: list[float | None] = []
        for mode in _MODES:
            whole = self.run(batch, index, mode, noted=False, dropout=False)
            alone = self.run(other, index, mode, noted=False, dropout=False)
            fits = whole is not None and whole.shape[:1] == (size,)
            if not fits or whole is None or alone is None or alone.shape != whole.shape:
                found.append(None)
            else:
                chosen = kept.to(whole.device)
                found.append(_distance(alone[chosen], whole[chosen]))
        return found[0], found[1]


_MODES: tuple[Mode, Mode] = ("eval", "train")
_OTHERWISE = (
    "If the model is called another way: a loader that gives what it takes, or, in Python, "
    "forward=lambda model, batch: model(...)."
)
_SAID = 300  # characters of an error: PyTorch lists every signature of an operator where none fits
# PyTorch's words and this package's.
_ONE_VALUE = "more than 1 value per channel"


def _comparable(inputs: Sequence[tuple[tuple[int, ...], Call]]) -> tuple[Call, ...]:
    """Those of one shape, the first one's, on the CPU."""
    calls = [
        call for shape, call in inputs if shape == inputs[0][0] and call.mean.shape == inputs[0][1].mean.shape
    ]
    numbers = iter(on_host([part for call in calls for part in (call.mean, call.var, call.between)]))
    return tuple(
        replace(call, mean=next(numbers), var=next(numbers), between=next(numbers)) for call in calls
    )


def _mostly(said: Iterable[bool]) -> bool:
    """What more than half say: of small pictures cropped at random, one batch of eight may look unrelated."""
    each = list(said)
    return 2 * sum(each) > len(each)


def _drops(module: nn.Module) -> bool:
    return isinstance(module, _DropoutNd) or type(module).__name__ in (
        "DropPath",
        "StochasticDepth",
        "DropBlock2d",
    )


def _gap(trained: Tensor | None, evaluated: Tensor | None) -> float | None:
    """The distance of the two; without bound where eval mode overflows and training does not."""
    if trained is None or evaluated is None:
        return None
    if bool(trained.isfinite().all()) and not bool(evaluated.isfinite().all()):
        return float("inf")
    return _distance(trained, evaluated)


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
