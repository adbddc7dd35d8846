"""The fixes that cannot change what a network computes in eval mode, by the rule whose findings they mend."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from batchnorm._walk import Changes, Plan, Spot, prepared
from batchnorm.checks.finding import Finding
from batchnorm.nn.batch_norm import Extras

__all__ = ["SAFE", "repair"]

# What was done; "" for a layer that it is not for.
Mend = Callable[[Plan, Spot], str]


def _wider(plan: Plan, spot: Spot) -> str:
    """BN003: the running statistics in float32.

    PyTorch's layers refuse them beside a weight and a bias in half precision, which become new parameters then.
    """
    module = spot.module
    for name in ("running_mean", "running_var"):
        buffer = module._buffers.get(name)
        if buffer is not None:
            plan.set_buffer(module, name, buffer.to(torch.float32))
    told = "running statistics kept in float32"
    for name, old in () if isinstance(module, Extras) else module._parameters.items():
        if old is not None and old.dtype in (torch.float16, torch.bfloat16):
            plan.set_parameter(
                module, name, nn.Parameter(old.detach().float(), requires_grad=old.requires_grad)
            )
            told = "running statistics, weight and bias kept in float32: make the optimizer anew"
    return told


def _momentum(plan: Plan, spot: Spot) -> str:
    """BN004: the weight of the new batch, as PyTorch has it."""
    momentum = round(1 - float(spot.module.momentum), 12)  # type: ignore[arg-type]
    if momentum <= 0:  # it would freeze the statistics
        return ""
    plan.set_attribute(spot.module, "momentum", momentum)
    return f"momentum is {momentum:g} now"


SAFE: dict[str, Mend] = {"BN003": _wider, "BN004": _momentum}


def repair(model: nn.Module, findings: Sequence[Finding], *, inplace: bool) -> Changes:
    """Mend what can be mended safely; everything else is skipped with its fix as the reason."""
    plan = Plan("fix", prepared(model, operation="fix", inplace=inplace))
    spots = {name: spot for spot in plan.spots for name in spot.names}
    notes: dict[str, list[str]] = {}
    left: dict[str, list[str]] = {}
    for finding in findings:
        for name in (finding.module, *finding.also):
            spot = spots.get(name)
            mend = SAFE.get(finding.code)
            what = mend(plan, spot) if spot is not None and mend is not None else ""
            if what:
                notes.setdefault(name, []).append(f"{finding.code}: {what}")
            else:
                left.setdefault(name, []).append(f"{finding.code}: {finding.fix}")
    for name, done in notes.items():
        plan.alter(spots[name], note="; ".join(done))
    for name, fixes in left.items():
        if name not in notes and name in spots:
            plan.skip(spots[name], "not mended by itself. " + "; ".join(fixes))
        else:
            plan.note(f"{name or 'model'}: not mended by itself. {'; '.join(fixes)}")
    return plan.apply()
