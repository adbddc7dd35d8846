"""The host's time for a layer: a chain of layers on tensors so small that launching them is all there is."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.bench.case import Case
from batchnorm.bench.contenders import Inputs, backend_of, eager, inputs, our_layer
from batchnorm.bench.record import OURS, Timing
from batchnorm.bench.timing import HostClock, interleaved

__all__ = ["LENGTH", "chain_times"]

# Long enough that what a forward and a backward cost once is spread, short enough for a GPU's queue, which holds about
# a thousand launches: beyond that the host would wait for the device.
LENGTH = 50


def chain_times(case: Case, rounds: int) -> dict[str, Any]:
    """Seconds of the host for a layer of the chain: forward alone, and forward and backward."""
    given = inputs(case)
    chains = {
        name: [build(case, given) for _ in range(LENGTH)]
        for name, build in ((OURS, our_layer), ("eager", eager))
    }
    times = {}
    for task in ("forward", "forward+backward"):
        functions = {name: _task(task, layers, given) for name, layers in chains.items()}
        timed = interleaved(functions, HostClock(case.device), rounds)
        times[task] = {name: asdict(_of_a_layer(timing)) for name, timing in timed.items()}
    return {"backends": {"training": backend_of(case, given, training=True)}, "times": times}


def _task(name: str, layers: Sequence[nn.Module], given: Inputs) -> Callable[[], object]:
    residual = given.residual
    # Found out here: to go through the parameters takes microseconds a layer.
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    wanted = [given.x, *parameters, *(() if residual is None else (residual,))]

    def forward() -> Tensor:
        y = given.x
        for layer in layers:
            y = layer(y) if residual is None else layer(y, residual)
        return y

    if name == "forward":
        return forward
    return lambda: torch.autograd.grad(forward(), wanted, given.dy)


def _of_a_layer(timing: Timing) -> Timing:
    return replace(
        timing,
        p20=timing.p20 / LENGTH,
        p50=timing.p50 / LENGTH,
        p80=timing.p80 / LENGTH,
        rounds=tuple(value / LENGTH for value in timing.rounds),
        faults=None,
    )
