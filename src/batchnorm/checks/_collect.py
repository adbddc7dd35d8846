"""All evidence, collected in one go from whatever the caller has."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.checks._batches import observe
from batchnorm.checks._graph import neighbours
from batchnorm.checks._oracle import self_tested
from batchnorm.checks._state import layers_of_model, layers_of_state, norms_of
from batchnorm.checks._timing import timed
from batchnorm.checks._watching import Norms
from batchnorm.checks.evidence import Decay, Evidence, Run, Seen, Stale
from batchnorm.stats._batches import Forward
from batchnorm.stats._targets import bare

__all__ = ["collect", "collect_state", "compiled", "decay_of", "steps_of"]


def collect_state(state: Mapping[str, Any]) -> Evidence:
    """From the keys and tensors of a state dict."""
    return Evidence(layers_of_state(state), from_state=True)


def collect(
    model: nn.Module,
    batches: Iterable[Any] | None,
    optimizer: torch.optim.Optimizer | None,
    averaged: nn.Module | None,
    world_size: int,
    forward: Forward | None,
    most: int,
    graph: bool,
    told: Callable[[int], None],
    is_compiled: bool,
    probes: frozenset[str] = frozenset(),
) -> Evidence:
    """From a model, and what else there is. `graph` says whether any rule asks for one.

    `probes` are what takes time of its own: "self-test" and "timing" of single layers.
    """
    norms = norms_of(model)
    around, untraced = neighbours(model, norms) if graph else ({}, "")
    layers = layers_of_model(model)
    seen: dict[str, Seen] = {}
    run = Run()
    if batches is not None:
        seen, run = observe(model, norms, batches, forward, most, told)
        if "self-test" in probes:
            seen = self_tested(norms, seen)
        if "timing" in probes:
            seen = timed(norms, seen)
    return Evidence(
        layers,
        training=model.training,
        compiled=is_compiled,
        learns=any(p.requires_grad for p in model.parameters()),
        neighbours=around,
        untraced=untraced,
        seen=seen,
        run=run,
        decay={} if optimizer is None else decay_of(norms, optimizer),
        steps=None if optimizer is None else steps_of(optimizer),
        stale={} if averaged is None else _stale(norms, averaged),
        world_size=world_size,
    )


def decay_of(norms: Norms, optimizer: torch.optim.Optimizer) -> dict[str, Decay]:
    decay = {
        id(p): float(group.get("weight_decay", 0.0))
        for group in optimizer.param_groups
        for p in group["params"]
    }
    return {
        name: Decay(decay.get(id(module.weight), 0.0), decay.get(id(module.bias), 0.0))
        for name, module in norms
    }


def steps_of(optimizer: torch.optim.Optimizer) -> int | None:
    """How many steps the optimizer has taken, where it counts them (Adam and its kin do, SGD does not)."""
    counts = [state["step"] for state in optimizer.state.values() if "step" in state]
    return int(max(counts)) if counts else None


def _stale(norms: Norms, averaged: nn.Module) -> dict[str, Stale]:
    """The averaged model's buffers against the model's, layer by layer."""
    others = dict(norms_of(bare(averaged, "check")))
    # AveragedModel, and the wrappers of other packages, hold the average as `module`.
    others |= {name.removeprefix("module."): module for name, module in others.items()}
    found = {}
    for name, module in norms:
        other = others.get(name)
        mean, var = module.running_mean, module.running_var
        if other is None or mean is None or var is None or other.running_mean is None:
            continue
        sigma = (var.double() + module.eps).sqrt()
        its_mean = other.running_mean.to(mean.device).double()
        its_var = other.running_var.to(var.device).double()  # type: ignore[union-attr]  # there with the mean
        log_ratio = 0.5 * ((its_var + module.eps) / (var.double() + module.eps)).log()
        mine, theirs = module.num_batches_tracked, other.num_batches_tracked
        counted = isinstance(mine, Tensor) and isinstance(theirs, Tensor)
        found[name] = Stale(
            updates=int(theirs) if theirs is not None else None,
            behind=int(mine) - int(theirs) if counted and mine is not None and theirs is not None else None,
            distance=float(((its_mean - mean.double()) / sigma).abs().median()),
            scale=float(log_ratio.abs().median().exp()),
            initial=_initial(its_mean, its_var) and not _initial(mean, var),
        )
    return found


def _initial(mean: Tensor, var: Tensor) -> bool:
    return bool((mean == 0).all() and (var == 1).all())


def compiled(model: object) -> bool:
    """Whether torch.compile has been asked to compile a model or a part of it, by `model.compile()` or around it."""
    if not isinstance(model, nn.Module):
        return False
    return any(
        getattr(each, "_compiled_call_impl", None) is not None
        or isinstance(getattr(each, "_orig_mod", None), nn.Module)
        for each in model.modules()
    )
