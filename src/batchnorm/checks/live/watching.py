"""`watch`: what its arguments must be, and the watcher that they make."""

import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from itertools import chain, groupby

import torch
import torch.distributed as dist
from torch import nn

from batchnorm._errors import InputError, InputTypeError, ModelError, message
from batchnorm.checks._check import held
from batchnorm.checks._collect import compiled
from batchnorm.checks.finding import Finding
from batchnorm.checks.live.judging import Judge
from batchnorm.checks.live.pace import Pace
from batchnorm.checks.live.table import LiveTable
from batchnorm.checks.live.watcher import Watcher
from batchnorm.checks.live.writing import Writing
from batchnorm.checks.rule import chosen
from batchnorm.checks.telling import places
from batchnorm.stats._targets import bare

__all__ = ["watch"]


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

    Of every layer are written, as `batchnorm/LAYER/...`: `mean_gap` and `mean_gap_high`, how far the running mean is
    from the batch's, |running − batch| / σ, in the channel in the middle and in the one that a tenth of the channels
    exceed; `variance_ratio`, the running variance over the batch's; `gamma` and `gamma_min`, the mean and least |γ|;
    `dead` and `nonfinite`, shares of the channels; `values`, per channel in a batch. Of the model:
    `batchnorm/worst_mean_gap`, `batchnorm/findings` (warnings and errors), `batchnorm/overhead`.

    Wrong to use as a proof: a rule says what it saw in the steps that were looked at. Rules that need other runs of the
    model (BN101, BN102, ...) are in `findings.not_run`; `check` has them.

    Args:
        model: the module that the loop calls: plain, in DistributedDataParallel, or compiled (then weights and running
            statistics alone are looked at: hooks on its layers would compile it anew).
        writer: TensorBoard's SummaryWriter or anything with `add_scalar(tag, value, step)`; or a function
            `writer(tag, value, step)`. What it raises ends the watch and reaches the loop.
        every: look at the steps that this divides. If not given, at the first, then on round numbers, so that looking
            stays below 3 % of the time of the steps; what the first two take longer than a usual look is not counted.
        optimizer: the one that trains it, for several forwards a step, and for the rules that ask for it.
        table: a live table on stderr; if not given, where that is a terminal and rich is installed. Of several
            processes only the first shows one.
        on_finding: called with every new finding, instead of a line on stderr. It is told once: what layers and
            optimizer are by themselves at once, what is measured on batches when two looks in a row have it.
        histograms: of γ, β, the gaps, and log10 of the variance, in every fifth look. If not given, where the writer
            has `add_histogram`; True lets a function have them as tensors.
        select: codes, or beginnings of codes, of the rules to run; all, if not given.
        ignore: codes, or beginnings of codes, of rules to leave out.
        start: the step before the first, where a training goes on.

    Returns:
        Watcher: a context manager, with `close()`, `findings`, `numbers`, `step` and `overhead`.

    Raises:
        InputTypeError: `model` is no module, `writer` neither kind, `optimizer` no optimizer, `on_finding` no function,
            `table` neither True, False nor None.
        InputError: `every` is below 1, `start` below 0, an unknown rule, or histograms for a writer without them.
        ModelError: the model is scripted or sharded, or on the meta device.
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
    if table is not None and not isinstance(table, bool):
        raise InputTypeError(message("watch: table", got=repr(table), expected="True, False or None"))
    network = bare(model, "watch")
    _refuse_meta(network)
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
            held=held(model),
        ),
        pace=Pace(every, start),
        writing=writing,
        table=shown,
        tell=_handed_to(on_finding) if on_finding is not None else _print if first else _say_nothing,
        calls=not (is_compiled or spread),
    )
    watcher.hang(optimizer)
    return watcher


def _refuse_meta(model: nn.Module) -> None:
    empty = [name for name, value in chain(model.named_parameters(), model.named_buffers()) if value.is_meta]
    if empty:
        raise ModelError(
            message(
                "watch: model",
                got=f"{empty[0]} on the meta device, which holds no numbers",
                expected="a model with its weights",
                fix="Call model.to_empty(device=...) and load or initialize them first.",
            )
        )


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
