"""`check`: what is wrong with the batch norm in a model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from batchnorm._errors import InputError, InputTypeError, message
from batchnorm.checks._collect import collect, collect_state, compiled
from batchnorm.checks._fix import known, marked, repair
from batchnorm.checks.evidence import Evidence
from batchnorm.checks.finding import Finding
from batchnorm.checks.findings import Findings
from batchnorm.checks.rule import Need, Rule, chosen
from batchnorm.stats._batches import Forward
from batchnorm.stats._targets import bare

__all__ = ["check", "held", "judged", "none_in"]

# What only these rules need and what takes time of its own.
_PROBES = {"BN109": "timing", "BN112": "self-test"}
# Rules that do without a graph, and say more with one.
_LOOK_AROUND = frozenset({"BN101"})

_MISSING: dict[Need, str] = {
    "model": "a model: this is a state dict",
    "graph": "a forward that torch.fx can follow",
    "batches": "batches=",
    "optimizer": "optimizer=",
    "averaged": "averaged=",
    "world_size": "world_size= of 2 or more",
}


def check(
    model: nn.Module | Mapping[str, Any],
    *,
    batches: Iterable[Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    averaged: nn.Module | None = None,
    world_size: int | None = None,
    select: Iterable[str] | str | None = None,
    ignore: Iterable[str] | str | None = None,
    forward: Forward | None = None,
    max_batches: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Findings:
    """Look for what is wrong with the batch norm in a model: in its numbers, its code, and on your data.

    Rules BN001 to BN019 look at the layers, their neighbours, the optimizer; rules BN101 to BN113 at what happens when
    batches run. Each rule has a page: `batchnorm explain BN101`. The model is run in training and in eval mode, some
    three forwards a batch and one backward, and is afterwards as it was.

    Wrong to use as a proof: a rule says what it saw on these batches, and no more.

    Args:
        model: any module, or a state dict, on which the rules about running statistics and weights still work.
        batches: a DataLoader or another iterable of batches: tensors, tuples whose first element is the input, or dicts
            of keyword arguments. They should come as in training: same size, same order, same transformations.
        optimizer: the one that trains it, for weight decay and for how often it steps.
        averaged: an averaged copy of the model (EMA, SWA, `torch.optim.swa_utils.AveragedModel`).
        world_size: how many processes train it; that of `torch.distributed` if it runs, else 1.
        select: codes, or beginnings of codes, of the rules to run; all, if not given.
        ignore: codes, or beginnings of codes, of rules to leave out.
        forward: `forward(model, batch)`, where the model is called in another way.
        max_batches: how many batches are looked at.
        progress: called after every forward with how many there have been.

    Returns:
        Findings: a sequence of findings, the worst first, with `to_json()`, `save("report.html")` and `fix()`.

    Raises:
        InputTypeError: `model` is neither a module nor a state dict, `batches` no iterable of batches.
        InputError: an unknown rule, a state dict together with what needs a model, or an optimizer that holds none of
            the model's parameters.
        DataError: no batches, or ones that the model does not take.
        ModelError: the model is scripted or sharded.

    Example:
        >>> import torch, batchnorm
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8, momentum=0.99))
        >>> for finding in batchnorm.check(net, select="BN004"): print(finding)
        1: BN004 warning: momentum is 0.99: each batch replaces 99 % of the running statistics
    """
    rules = chosen(select, ignore)
    if isinstance(max_batches, bool) or not isinstance(max_batches, int) or max_batches < 1:
        raise InputError(
            message("check: max_batches", got=repr(max_batches), expected="a whole number of at least 1")
        )
    if isinstance(model, Mapping):
        given = {"batches": batches, "optimizer": optimizer, "averaged": averaged, "forward": forward}
        for name, value in given.items():
            if value is not None:
                raise InputError(
                    message(
                        f"check: {name}",
                        got="a state dict to go with it",
                        expected="a model",
                        fix="Pass the model.",
                    )
                )
        _refuse_checkpoint(model)
        return judged(collect_state(model), rules, given=frozenset(), model=None)
    network = bare(model, "check")
    if averaged is not None and not isinstance(averaged, nn.Module):
        raise InputTypeError(
            message(
                "check: averaged", got=type(averaged).__name__, expected="a module: the averaged model itself"
            )
        )
    if optimizer is not None:
        _refuse_stranger(optimizer, network)
    if world_size is None:
        world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    evidence = collect(
        network,
        batches,
        optimizer,
        averaged,
        world_size,
        forward,
        max_batches,
        not _LOOK_AROUND.isdisjoint(rules) or any("graph" in rule.needs for rule in rules.values()),
        progress or (lambda done: None),
        compiled(model),
        frozenset(probe for code, probe in _PROBES.items() if code in rules),
    )
    has: set[Need] = {"model"}
    for name, value in (("batches", batches), ("optimizer", optimizer), ("averaged", averaged)):
        if value is not None:
            has.add(name)  # type: ignore[arg-type]
    if evidence.neighbours or not evidence.layers:
        has.add("graph")
    if world_size > 1:
        has.add("world_size")
    return judged(evidence, rules, given=frozenset(has), model=network, held=held(model))


def held(model: nn.Module) -> bool:
    """Whether DistributedDataParallel is around the network: it goes on reducing the parameters that it has seen."""
    return any(isinstance(each, DistributedDataParallel) for each in model.modules())


def _refuse_stranger(optimizer: object, model: nn.Module) -> None:
    """What is no optimizer, or that of another model: of its weight decay nothing would be found."""
    kind = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputTypeError(message("check: optimizer", got=kind, expected="a torch.optim.Optimizer"))
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise InputError(
            message(
                "check: optimizer",
                got=f"one of class {kind} that holds none of this model's parameters",
                expected="the optimizer that trains this model",
                fix=f"Make it of the model that is checked: {kind}(model.parameters(), ...).",
            )
        )


def _refuse_checkpoint(state: Mapping[str, Any]) -> None:
    """A checkpoint that holds a state dict beside other things is none."""
    if any(isinstance(value, torch.Tensor) for value in state.values()):
        return
    inner = [
        key
        for key, value in state.items()
        if isinstance(value, Mapping) and any(isinstance(each, torch.Tensor) for each in value.values())
    ]
    raise InputTypeError(
        message(
            "check: model",
            got="a dictionary without tensors",
            expected="a torch.nn.Module, or a state dict",
            fix=f"Pass what it holds as {inner[0]!r}." if inner else "Pass model.state_dict().",
        )
    )


def judged(
    evidence: Evidence,
    rules: Mapping[str, Rule],
    *,
    given: frozenset[Need],
    model: nn.Module | None,
    held: bool = False,
) -> Findings:
    """Let every rule that has what it needs look at the evidence. `held`: a wrapper holds the model's parameters."""
    found: list[Finding] = []
    ran, not_run = [], {}
    for code, rule in rules.items():
        lacking = sorted(rule.needs - given)
        if lacking:
            not_run[code] = ", ".join(_MISSING[need] for need in lacking)
            continue
        ran.append(code)
        found += _joined(list(rule.find(evidence)))
    notes = []
    if not evidence.layers:
        notes.append(none_in(model, from_state=evidence.from_state))
    if evidence.run.no_backward:
        notes.append(f"a backward pass could not be run: {evidence.run.no_backward}")
    if evidence.untraced:
        notes.append(f"not all of the forward could be followed: {evidence.untraced}")
    layers = {} if model is None else known(model, [layer.name for layer in evidence.layers])
    return Findings(
        found if model is None else marked(model, found, layers),
        layers=len(evidence.layers),
        ran=ran,
        not_run=not_run,
        notes=notes,
        repair=None
        if model is None
        else lambda some, inplace: repair(model, some, layers, inplace=inplace, parameters=not held),
    )


def none_in(model: nn.Module | None, *, from_state: bool = False) -> str:
    """The note of a model or a state dict without a batch norm."""
    if from_state:
        return "there is no batch norm with running statistics in it"
    lazy = model is None or any(isinstance(each, _BatchNorm) for each in model.modules())
    return f"there is no batch norm {'that knows its shape ' if lazy else ''}in it"


def _joined(findings: Sequence[Finding]) -> list[Finding]:
    """What is said of several layers in the very same words becomes one finding."""
    kept: dict[tuple[str, ...], Finding] = {}
    for each in findings:
        key = (each.severity, each.message, each.cause, each.fix)
        first = kept.get(key)
        kept[key] = each if first is None else replace(first, also=(*first.also, each.module))
    return list(kept.values())
