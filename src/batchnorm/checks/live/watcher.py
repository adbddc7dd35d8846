"""The watcher: hooks on a model and its optimizer, and what follows from a look."""

import inspect
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from batchnorm import ops
from batchnorm.checks._cells import cells
from batchnorm.checks._ear import Ear
from batchnorm.checks._state import layers_of_model
from batchnorm.checks.finding import Finding
from batchnorm.checks.findings import Findings
from batchnorm.checks.live.judging import Judge
from batchnorm.checks.live.looking import Look, Looking
from batchnorm.checks.live.numbers import numbers_of
from batchnorm.checks.live.pace import Pace
from batchnorm.checks.live.table import LiveTable
from batchnorm.checks.live.writing import Writing

__all__ = ["Watcher"]


class _Ear(Ear):
    """Of the model and of optimizers: in a graph it is not there at all."""

    def __call__(self, *args: Any) -> None:
        if not torch.compiler.is_compiling():
            super().__call__(*args)


def _calls_of(module: nn.Module) -> int:
    """How many calls of a module are on the stack, each in the method of PyTorch's that calls its hooks."""
    frame, found = inspect.currentframe(), 0
    while frame is not None:
        found += frame.f_code is _CALL and frame.f_locals.get("self") is module
        frame = frame.f_back
    return found


_CALL = nn.Module._call_impl.__code__
# Forwards without a step of the optimizer are no accumulation of gradients.
_WAITED = 64


class Watcher:
    """A model that is watched, from `batchnorm.watch` until `close()` or the end of a `with` block.

    Attributes:
        numbers: of the last look, the numbers of every layer by the last part of their tags; after `close()`, those of
            weights and running statistics are of the end.

    Example:
        >>> import torch, batchnorm
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4))
        >>> with batchnorm.watch(net, every=2) as watcher:
        ...     for x in torch.randn(4, 32, 2):
        ...         net(x).square().mean().backward()
        >>> watcher
        Watcher(Sequential: step 4, nothing found, closed)
        >>> watcher.numbers["1"]["values"], watcher.numbers["1"]["gamma"]
        (32.0, 1.0)
    """

    def __init__(
        self,
        model: nn.Module,
        entered: nn.Module,
        *,
        judge: Judge,
        pace: Pace,
        writing: Writing,
        table: LiveTable | None,
        tell: Callable[[int, list[Finding]], None],
        calls: bool,
    ) -> None:
        self.numbers: dict[str, dict[str, float]] = {}
        self._model, self._entered = model, entered
        self._judge, self._pace, self._writing = judge, pace, writing
        self._table, self._tell, self._calls = table, tell, calls
        self._handles: list[Any] = []
        self._looking: Looking | None = None
        self._inside = False  # the model's forward
        self._thread: int | None = None  # that runs it
        self._lock = threading.Lock()
        self._deeper = 0  # calls of the model by itself, of which the outer one is meant
        self._by_optimizer = self._on = False  # a step of the optimizer has begun
        self._never, self._waited = False, 0  # the optimizer has not stepped, for so many forwards
        self._passed, self._trained = 0, False  # forwards that were no step, and whether any was
        self._looked: int | None = None  # the last step that was looked at
        self._closed = False
        # At the interpreter's end, too: a table that is not stopped leaves the terminal without a cursor.
        self._at_exit = None if table is None else weakref.finalize(self, table.stop)

    def __repr__(self) -> str:
        found = len(self._judge.told)
        said = f"{found} finding{'s' if found != 1 else ''}" if found else "nothing found"
        closed = ", closed" if self._closed else ""
        return f"Watcher({type(self._model).__name__}: step {self.step:,}, {said}{closed})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()

    @property
    def step(self) -> int:
        """The step that is on, or was last."""
        return self._pace.step

    @property
    def overhead(self) -> float:
        """What looking has cost so far, as a share of the time of the steps: 0.02 is 2 %."""
        return self._pace.overhead

    @property
    def findings(self) -> Findings:
        """All that has been found, as `check` returns it. What has gone since is among it, and a note says so."""
        if not self._inside:
            self._settle()
        return self._judge.findings(self._notes())

    def _notes(self) -> list[str]:
        """What keeps it from seeing the training."""
        notes = []
        if self._passed and not self._trained:
            notes.append(
                f"no training step was seen: {self._passed:,} forwards were in eval mode or without gradients; "
                "call model.train() before the loop"
            )
        elif self.step == self._pace.start:
            notes.append(
                "no training step was seen: watch the module that the loop calls, or give optimizer="
            )
        elif self._looked is None and self._looking is None:
            notes.append(
                f"no step was looked at: there were {self.step - self._pace.start:,}; give a smaller every="
            )
        if self._never and self._waited >= _WAITED:
            notes.append(
                f"the optimizer has not stepped in {self._waited:,} forwards: "
                "pass the one that trains the model as optimizer="
            )
        return notes

    def close(self) -> None:
        """Take all hooks off, look at weights and running statistics once more, and leave the table as it stands.

        A second call does nothing.
        """
        if self._closed:
            return
        self._take_off()
        try:
            self._settle()
            self._look_at_the_end()
        finally:
            self._abandon()

    def _abandon(self) -> None:
        """Close without a last look: the step that it is about has not ended."""
        self._take_off()
        self._looking = None
        if self._at_exit is not None:
            self._at_exit()

    def _take_off(self) -> None:
        self._closed = True
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._looking is not None:
            self._looking.end()

    def hang(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Put the hooks on the model and, where steps are its, on the optimizer."""
        # A model that is compiled in place would take the hooks into its graph; its optimizer is heard instead.
        inside = getattr(self._entered, "_compiled_call_impl", None) is not None
        self._by_optimizer = optimizer is not None or inside
        self._never = optimizer is not None
        if not inside:
            # Before and behind the layers' own, should the model be a layer, and if it fails, too.
            self._handles = [
                self._entered.register_forward_pre_hook(
                    _Ear(self._forward_begins), prepend=True, with_kwargs=True
                ),
                self._entered.register_forward_hook(_Ear(self._forward_ends), always_call=True),
            ]
        if optimizer is not None:
            self._handles.append(optimizer.register_step_post_hook(_Ear(self._stepped)))
        elif inside:
            first: list[weakref.ref[torch.optim.Optimizer]] = []
            self._handles.append(register_optimizer_step_post_hook(_Ear(self._stepped_if_mine(first))))

    def _forward_begins(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is not self._entered or ops.is_recomputation() or not self._alone():
            return
        if self._inside:
            if _calls_of(module) > 1:
                self._deeper += 1
                return
            # Ctrl-C: PyTorch calls the hooks behind a forward after an Exception, and not after that.
            self._end()
            self._thread = threading.get_ident()
        try:
            if not self._by_optimizer:
                self._settle()
            if not (torch.is_grad_enabled() and self._model.training):
                self._passed += 1
                self._thread = None
                return
            self._inside = self._trained = True
            begins = not self._on
            self._waited += 1
            if begins:
                self._step_begins()
            if self._calls and (self._looking is not None or (begins and self._pace.glances)):
                since = time.perf_counter()
                with torch.no_grad():
                    if begins and self._pace.glances:
                        self._judge.glance(cells(args, kwargs))
                    if self._looking is not None:
                        self._looking.begin(args, kwargs)
                self._pace.pay(since)
        except BaseException:
            self._abandon()
            raise

    def _forward_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        mine = self._inside and self._thread == threading.get_ident()
        if module is not self._entered or not mine or ops.is_recomputation():
            return
        if self._deeper:
            self._deeper -= 1
        else:
            self._end(output)

    def _alone(self) -> bool:
        """Whether no other thread is in the model: of two forwards at a time one is watched."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.get_ident()
            return self._thread == threading.get_ident()

    def _end(self, output: Any = None) -> None:
        self._inside, self._deeper = False, 0
        if self._looking is not None:
            since = time.perf_counter()
            self._looking.end(output)
            self._pace.pay(since)
        self._thread = None

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The optimizer's hook. A step in which no forward was heard shows weights and running statistics."""
        try:
            if not self._on:
                self._step_begins()
            self._never, self._waited = False, 0
            self._settle()
            self._on = False
        except BaseException:
            self._abandon()
            raise

    def _stepped_if_mine(
        self, first: list[weakref.ref[torch.optim.Optimizer]]
    ) -> Callable[[torch.optim.Optimizer, Any, Any], None]:
        """The hook of all optimizers, of which the first that trains a parameter of the model is meant."""

        def stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if not first or first[0]() is None:
                mine = {id(p) for p in self._model.parameters()}
                if not any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
                    return
                first[:] = [weakref.ref(optimizer)]
            if first[0]() is optimizer:
                self._stepped(optimizer, args, kwargs)

        return stepped

    def _step_begins(self) -> None:
        self._on = self._by_optimizer
        if self._pace.begin():
            since = time.perf_counter()
            self._looking = Looking(self._model, self.step, calls=self._calls)
            self._pace.pay(since)

    def _settle(self) -> None:
        """The step that was looked at is over: judge it, write it, show it."""
        looking, self._looking = self._looking, None
        if looking is None:
            return
        since = time.perf_counter()
        look = looking.finish(whole=not (self._never and looking.full))
        new = self._judge.judge(look, self.step - self._pace.start)
        self.numbers = {layer.name: numbers_of(layer, look.calls(layer.name)) for layer in look.layers}
        self._writing.write(look, self.numbers, self._summary())
        for finding in new:
            self._writing.tell(finding, look.step)
        self._pace.pay(since)
        self._pace.looked()
        since = time.perf_counter()
        self._looked = look.step
        if self._table is not None:
            self._table.show(self.numbers, self._judge.told, self._pace, self._title())
        if new:  # above the table
            self._tell(look.step, new)
        self._pace.pay(since)

    def _summary(self) -> dict[str, float]:
        gaps = [found["mean_gap"] for found in self.numbers.values() if "mean_gap" in found]
        counted = [each for each in self._judge.told if not each.gone and each.finding.severity != "info"]
        found = {"findings": float(len(counted)), "overhead": self.overhead}
        return {"worst_mean_gap": max(gaps), **found} if gaps else found

    def _look_at_the_end(self) -> None:
        """What needs no forward: weights, running statistics, and the rules about them."""
        if self.step == self._pace.start:
            return
        since = time.perf_counter()
        new: list[Finding] = []
        if self._looked != self.step:
            layers = layers_of_model(self._model)
            new = self._judge.judge_end(layers, self.step, self.step - self._pace.start)
            numbers = {layer.name: numbers_of(layer, ()) for layer in layers}
            self.numbers = {name: {**self.numbers.get(name, {}), **found} for name, found in numbers.items()}
            if new:
                summary = self._summary()
                summary.pop("worst_mean_gap", None)  # of a batch
                self._writing.write(Look(self.step, layers, {}, 0), numbers, summary)
        for finding in new:
            self._writing.tell(finding, self.step)
        self._pace.pay(since)
        if self._table is not None:
            self._table.show(self.numbers, self._judge.told, self._pace, self._title(ended=True), ended=True)
        if new:
            self._tell(self.step, new)

    def _title(self, *, ended: bool = False) -> str:
        """`ended` for the last one, which says of which step the batches are."""
        name = f"batch norm in {type(self._model).__name__}"
        if ended and self._looked != self.step:
            seen = (
                f"batches of step {self._looked:,}" if self._looked is not None else "no batch was looked at"
            )
            return f"{name} · ended at step {self.step:,} · {seen}"
        interval = self._pace.interval
        every = "every step" if interval == 1 else f"every {interval:,} steps"
        return f"{name} · step {self.step if ended else self._looked:,} · {every}"
