"""`Findings.fix`: what the mends of the rules wish, decided for all layers first and then carried out."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from batchnorm._walk import Changes, Plan, Spot, prepared, walk
from batchnorm.checks._mends import MENDS, Left, Wish
from batchnorm.checks.finding import Finding, worst_first
from batchnorm.nn.families import FAMILIES
from batchnorm.surgery._convert import new_class, plan_conversion
from batchnorm.surgery._freeze import plan_freeze

__all__ = ["Known", "known", "marked", "repair"]

# The layers as the check saw them, by name: the object and its class.
Known = Mapping[str, tuple[nn.Module, type[nn.Module]]]


def known(model: nn.Module, names: Sequence[str]) -> Known:
    """The layers of these names as they stand now."""
    modules = {spot.name: spot.module for spot in walk(model)}
    return {name: (modules[name], type(modules[name])) for name in names}


def marked(model: nn.Module, findings: Sequence[Finding], layers: Known) -> tuple[Finding, ...]:
    """The findings, the worst first, each with whether `repair` mends it."""
    ordered = worst_first(findings)
    answers, _ = _decide(model, ordered, layers, parameters=True)
    left = {number for (number, _), answer in answers.items() if isinstance(answer, Left)}
    return tuple(replace(each, mendable=number not in left) for number, each in enumerate(ordered))


def repair(
    model: nn.Module, findings: Sequence[Finding], layers: Known, *, inplace: bool, parameters: bool
) -> Changes:
    """Mend what can be mended safely; everything else is skipped with its fix as the reason.

    Without `parameters` none of the model's own is replaced: a wrapper holds them.
    """
    plan = Plan("fix", prepared(model, operation="fix", inplace=inplace))
    answers, wishes = _decide(model, findings, layers, parameters=parameters or not inplace)
    done: dict[str, list[str]] = {}
    left: dict[str, list[str]] = {}
    for (number, name), answer in answers.items():
        if isinstance(answer, Left):
            left.setdefault(name, []).append(f"{findings[number].code}: {answer.why}")
        else:
            done.setdefault(name, []).append(f"{findings[number].code}: {answer}")
    spots = {spot.name: spot for spot in plan.spots}
    made: dict[int, Any] = {}
    for name, texts in done.items():
        _carry_out(plan, spots[name].module, wishes[name], made)
        plan.alter(spots[name], note="; ".join(texts))
    for name, texts in left.items():
        spot = spots.get(name) or Spot(model, (name,), ())  # one that is gone since the check
        plan.skip(spot, f"not mended by itself. {'; '.join(texts)}")
    return plan.apply()


_Answers = dict[tuple[int, str], str | Left]  # by a finding's number and a layer's name


def _decide(
    model: nn.Module, findings: Sequence[Finding], layers: Known, *, parameters: bool
) -> tuple[_Answers, dict[str, Wish]]:
    """What the mends answer for the model as it stands, and what is to become of each layer. Nothing is touched."""
    now = {spot.name: spot.module for spot in walk(model)}
    answers: _Answers = {}
    wishes: dict[str, Wish] = {}
    for number, finding in enumerate(findings):
        mend = MENDS.get(finding.code)
        for name in (finding.module, *finding.also):
            if mend is None:
                answers[number, name] = Left(finding.fix)
                continue
            answer: str | Left = _as_it_was(name, now, layers)
            if not isinstance(answer, Left):
                wish = wishes.setdefault(name, Wish(now[name]))
                answer = mend(wish, finding.evidence)
                if isinstance(answer, Left):
                    answer = Left(f"{answer.why}. {finding.fix}")
            answers[number, name] = answer
    _settle_wide(model, findings, answers, wishes, parameters)
    return answers, wishes


def _as_it_was(name: str, now: Mapping[str, nn.Module], layers: Known) -> str | Left:
    """Whether the layer is still the one that the check saw."""
    if name not in now:
        return Left("it is gone since the check: check again")
    if name not in layers or layers[name][0] is not now[name]:
        return Left("another layer stands there since the check: check again")
    if layers[name][1] is not type(now[name]):
        return Left(f"it has become a {type(now[name]).__name__} since the check: check again")
    return ""


def _settle_wide(
    model: nn.Module,
    findings: Sequence[Finding],
    answers: _Answers,
    wishes: Mapping[str, Wish],
    parameters: bool,
) -> None:
    """Widen no tensor for one of its holders alone, and say where parameters are new."""
    wide = {key: wishes[key[1]] for key in answers if key[1] in wishes and wishes[key[1]].wide}
    wide = {key: wish for key, wish in wide.items() if findings[key[0]].code == "BN003"}
    holders = _holders(model)
    while wide:
        held = {
            key: why for key, wish in wide.items() if (why := _held(wish, wide.values(), holders, parameters))
        }
        if not held:
            break
        for key, why in held.items():  # what shares a tensor with these may not have it either
            wide.pop(key).wide = False
            answers[key] = Left(f"{why}. {findings[key[0]].fix}")
    for key, wish in wide.items():
        if wish.replaced().keys() - _STATISTICS:
            answers[key] = "running statistics, weight and bias kept in float32: make the optimizer anew"


_STATISTICS = {"running_mean", "running_var"}
_Holders = Mapping[
    int, Sequence[tuple[nn.Module, str, str]]
]  # by a tensor's id: module, its name, the tensor's


def _holders(model: nn.Module) -> _Holders:
    found: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for spot in walk(model):
        for name, tensor in (*spot.module._parameters.items(), *spot.module._buffers.items()):
            found.setdefault(id(tensor), []).append((spot.module, spot.name, name))
    return found


def _held(wish: Wish, wide: Collection[Wish], holders: _Holders, parameters: bool) -> str:
    """Why the tensors of a layer cannot be replaced by wider ones; "" if they can."""
    replaced = wish.replaced()
    if not parameters and replaced.keys() - _STATISTICS:
        return "DistributedDataParallel holds its weight and bias: mend the network before it is wrapped"
    for name, tensor in replaced.items():
        for module, where, its in holders[id(tensor)]:
            if not any(module is each.module and its in each.replaced() for each in wide):
                return f"its {name} is also {where or 'the model'}'s {its}, which stays in half precision"
    return ""


def _carry_out(plan: Plan, module: Any, wish: Wish, made: dict[int, Any]) -> None:
    """Plan all that is to become of a layer; `made` has new tensors by the ids of those whose place they take."""
    cls: type[nn.Module] = type(module)
    if wish.to:
        new, reason = new_class(module, FAMILIES[wish.to], 0, ())
        if new is None:  # the mend has asked, of the same class
            raise RuntimeError(reason)
        cls = new
        plan_conversion(plan, module, cls, {"backend": wish.backend} if wish.backend else {})
    elif wish.backend:
        plan.set_attribute(module, "backend", wish.backend)
    if wish.frozen:
        plan_freeze(plan, module, cls)
    if wish.momentum is not None:
        plan.set_attribute(module, "momentum", wish.momentum)
    for name in Wish(module, to=wish.to, wide=wish.wide).replaced():
        if name in _STATISTICS:
            old = module._buffers[name]
            plan.set_buffer(module, name, made.setdefault(id(old), old.float()))
        else:
            weight = module._parameters[name]
            wider = nn.Parameter(weight.detach().float(), weight.requires_grad)
            plan.set_parameter(module, name, made.setdefault(id(weight), wider))
