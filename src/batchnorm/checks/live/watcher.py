"""`watch`: hooks on a model and its optimizer, and what follows from a look."""

import sys
import time
import weakref
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from itertools import groupby
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from batchnorm import ops
from batchnorm._errors import InputError, InputTypeError, message
from batchnorm.checks._collect import compiled
from batchnorm.checks.finding import Finding
from batchnorm.checks.findings import Findings
from batchnorm.checks.live.judging import Judge
from batchnorm.checks.live.looking import Look, Looking
from batchnorm.checks.live.numbers import numbers_of
from batchnorm.checks.live.pace import Pace
from batchnorm.checks.live.table import LiveTable
from batchnorm.checks.live.writing import Writing
from batchnorm.checks.rule import chosen
from batchnorm.checks.telling import places
from batchnorm.stats._targets import bare

__all__ = ["Watcher", "watch"]


class _Ear:
    """A hook. In a copy of the model, or a pickle of it, stands one that hears nothing, and in a graph none at all."""

    def __init__(self, heard: Callable[..., None]) -> None:
        self._heard = heard

    def __call__(self, *args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._heard(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_deaf, ())


def _deaf() -> Callable[..., None]:
    return deaf


def deaf(*args: Any) -> None:
    """The hook of a copy."""


class Watcher:
    """A model that is watched, from `batchnorm.watch` until `close()` or the end of a `with` block.

    Attributes:
        numbers: of the last look, the numbers of every layer by the last part of their tags.

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
        self._by_optimizer = self._on = False  # a step of the optimizer has begun
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
        return self._judge.findings()

    def close(self) -> None:
        """Take all hooks off and leave the table as it stands. A second call does nothing."""
        if self._closed:
            return
        self._take_off()
        try:
            self._settle()
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

    def _hang(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Put the hooks on the model and, where steps are its, on the optimizer."""
        # A model that is compiled in place would take the hooks into its graph; its optimizer is heard instead.
        inside = getattr(self._entered, "_compiled_call_impl", None) is not None
        self._by_optimizer = optimizer is not None or inside
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
        if module is not self._entered or self._inside or ops.is_recomputation():
            return
        try:
            if not self._by_optimizer:
                self._settle()
            if not (torch.is_grad_enabled() and self._model.training):
                return
            self._inside = True
            if not self._on:
                self._step_begins()
            if self._looking is not None:
                since = time.perf_counter()
                with torch.no_grad():
                    self._looking.begin(args, kwargs)
                self._pace.pay(since)
        except BaseException:
            self._abandon()
            raise

    def _forward_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is not self._entered or not self._inside or ops.is_recomputation():
            return
        self._inside = False
        if self._looking is not None:
            since = time.perf_counter()
            self._looking.end()
            self._pace.pay(since)

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The optimizer's hook. A step in which no forward was heard shows weights and running statistics."""
        try:
            if not self._on:
                self._step_begins()
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
        look = looking.finish()
        new = self._judge.judge(look, self.step - self._pace.start)
        self.numbers = {layer.name: numbers_of(layer, look.calls(layer.name)) for layer in look.layers}
        self._writing.write(look, self.numbers, self._summary())
        for finding in new:
            self._writing.tell(finding, look.step)
        if new:
            self._tell(look.step, new)
        self._pace.pay(since)
        self._pace.looked()
        if self._table is not None:
            since = time.perf_counter()
            self._table.show(self.numbers, self._judge.told, self._pace, self._title(look))
            self._pace.pay(since)

    def _summary(self) -> dict[str, float]:
        gaps = [found["mean_gap"] for found in self.numbers.values() if "mean_gap" in found]
        counted = [each for each in self._judge.told if not each.gone and each.finding.severity != "info"]
        found = {"findings": float(len(counted)), "overhead": self.overhead}
        return {"worst_mean_gap": max(gaps), **found} if gaps else found

    def _title(self, look: Look) -> str:
        interval = self._pace.interval
        every = "every step" if interval == 1 else f"every {interval:,} steps"
        return f"batch norm in {type(self._model).__name__} · step {look.step:,} · {every}"


def watch(
    model: nn.Module,
    *,
    writer: object = None,
    every: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    table: bool | None = None,
    on_finding: Callable[[Finding], object] | None = None,
    histograms: bool | None = None,
    select: Iterable[str] | str | None = None,
    ignore: Iterable[str] | str | None = None,
    start: int = 0,
) -> Watcher:
    """See the batch norm of a model while it trains: numbers of every layer, a live table, and findings as they arise.

    A step is a forward of the model in training mode with gradients, or one of `optimizer`, if that is given. In a step
    that is looked at, the moments of every layer's input are taken; behind it come the running statistics, weights and
    biases, and the rules of `check` that a training gives evidence for. Between such steps there are two hooks on the
    model. The training itself is, bit for bit, what it would be without.

    Of every layer are written, as `batchnorm/LAYER/...`: `mean_gap` and `mean_gap_high`, how far the running mean is from
    the batch's, |running − batch| / σ, in the channel in the middle and in the one that a tenth of the channels exceed;
    `variance_ratio`, the running variance over the batch's; `gamma` and `gamma_min`, the mean and the least |γ|; `dead`
    and `nonfinite`, shares of the channels; `values`, per channel in a batch. Of the model: `batchnorm/worst_mean_gap`,
    `batchnorm/findings` (warnings and errors), `batchnorm/overhead`.

    Wrong to use as a proof: a rule says what it saw in the steps that were looked at. Rules that need other runs of the
    model (BN101, BN102, ...) are in `findings.not_run`; `check` has them.

    Args:
        model: the module that the loop calls: plain, in DistributedDataParallel, or compiled (then weights and running
            statistics alone are looked at: hooks on its layers would compile it anew).
        writer: TensorBoard's SummaryWriter or anything with `add_scalar(tag, value, step)`; or a function
            `writer(tag, value, step)`. What it raises ends the watch and reaches the loop.
        every: look at every so-manieth step. If not given, at the first and then on round numbers, so that looking stays
            below 3 % of the time of the steps.
        optimizer: the one that trains it, for several forwards a step, and for the rules that ask for it.
        table: a live table on stderr; if not given, where that is a terminal and rich is installed. Of several processes
            only the first shows one.
        on_finding: called with every new finding, instead of a line on stderr. It is told once; an error or a warning
            about the layers themselves at once, all else when two looks in a row have it.
        histograms: of γ, β, the gaps, and log10 of the variance, in every fifth look. If not given, where the writer has
            `add_histogram`; True lets a function have them as tensors.
        select: codes, or beginnings of codes, of the rules to run; all, if not given.
        ignore: codes, or beginnings of codes, of rules to leave out.
        start: the step before the first, where a training goes on.

    Returns:
        Watcher: a context manager, with `close()`, `findings`, `numbers`, `step` and `overhead`.

    Raises:
        InputTypeError: `model` is no module, `writer` neither kind, `optimizer` no optimizer, `on_finding` no function.
        InputError: `every` is below 1, `start` below 0, an unknown rule, or histograms for a writer without them.
        ModelError: the model is scripted or sharded.
        MissingDependencyError: `table=True` without rich.

    Example:
        >>> import torch, batchnorm
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4, momentum=0.99))
        >>> seen = []
        >>> with batchnorm.watch(net, every=1, on_finding=seen.append, writer=lambda tag, value, step: None):
        ...     for x in torch.randn(3, 32, 2):
        ...         net(x).square().mean().backward()
        >>> print(seen[0])
        1: BN004 warning: momentum is 0.99: each batch replaces 99 % of the running statistics
    """
    rules = chosen(select, ignore)
    _check_numbers(every, start)
    network = bare(model, "watch")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise InputTypeError(
            message("watch: optimizer", got=type(optimizer).__name__, expected="a torch.optim.Optimizer")
        )
    if on_finding is not None and not callable(on_finding):
        raise InputTypeError(
            message("watch: on_finding", got=type(on_finding).__name__, expected="a function of a Finding")
        )
    writing = Writing(writer, histograms)
    running = dist.is_available() and dist.is_initialized()
    first, processes = not running or dist.get_rank() == 0, dist.get_world_size() if running else 1
    spread = (
        isinstance(model, nn.DataParallel) and len(model.device_ids) > 1
    )  # its layers are copied at every call
    is_compiled = compiled(model)
    shown = LiveTable() if first and (_can_show() if table is None else table) else None
    watcher = Watcher(
        network,
        model if spread or is_compiled else network,
        judge=Judge(
            network,
            rules,
            optimizer,
            world_size=processes,
            unheard="compiled" if is_compiled else "copied to several devices" if spread else "",
        ),
        pace=Pace(every, start),
        writing=writing,
        table=shown,
        tell=_handed_to(on_finding) if on_finding is not None else _print if first else _say_nothing,
        calls=not (is_compiled or spread),
    )
    watcher._hang(optimizer)
    return watcher


def _check_numbers(every: object, start: object) -> None:
    for name, value, least in (("every", every, 1), ("start", start, 0)):
        if name == "every" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(
                message(f"watch: {name}", got=repr(value), expected=f"a whole number of at least {least}")
            )


def _can_show() -> bool:
    return sys.stderr is not None and sys.stderr.isatty() and find_spec("rich") is not None


def _print(step: int, findings: list[Finding]) -> None:
    """One line a rule, on what is stderr then."""
    ordered = sorted(findings, key=lambda each: (each.code, each.severity))
    for (code, severity), some in groupby(ordered, key=lambda each: (each.code, each.severity)):
        found = list(some)
        more = f" (and {len(found) - 1} like it)" if len(found) > 1 else ""
        print(
            f"batchnorm, step {step:,}: {code} {severity} at {places(found[0])}{more}: {found[0].message}. "
            f"Fix: {found[0].fix}",
            file=sys.stderr,
        )


def _handed_to(function: Callable[[Finding], object]) -> Callable[[int, list[Finding]], None]:
    def tell(step: int, findings: list[Finding]) -> None:
        for each in findings:
            function(each)

    return tell


def _say_nothing(step: int, findings: list[Finding]) -> None:
    """Of several processes the first speaks."""
