"""A process that measures: a job as JSON on stdin, one line of JSON for each result on stdout.

    echo '{"task": "machine", "device": "cpu", "threads": null}' | python -m batchnorm.bench._worker

Tasks: "machine" (the header and the speed of a copy), "cases" (each case of the list in turn), "host" (the host's time
for a layer in a chain), "rank" (one of several processes with synchronized layers). What anything else prints goes to
stderr.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.bench import machine
from batchnorm.bench._rank import rank_answers
from batchnorm.bench.accuracy import complaint, errors, exact
from batchnorm.bench.case import OPERATIONS, Case
from batchnorm.bench.contenders import (
    Inputs,
    backend_of,
    compiled,
    eager,
    inputs,
    operation,
    our_layer,
)
from batchnorm.bench.statistics import median
from batchnorm.bench.timing import clock_for, interleaved

__all__ = ["answers", "main", "measure_case"]

_CHAIN, _CHAIN_SHAPE = 50, (32, 64)


def main() -> None:
    """Do the job on stdin."""
    job = json.loads(sys.stdin.read())
    # stdout is the protocol's: what compilers and libraries print must not get between.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        for answer in answers(job):
            out.write(json.dumps(answer) + "\n")
            out.flush()


def answers(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The results of a job, as they come."""
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    if job["task"] == "machine":
        yield {"machine": machine.describe(job["device"]), "copy": machine.copy_speed(job["device"])}
    elif job["task"] == "host":
        yield host_seconds(job["device"], job["backend"])
    elif job["task"] == "rank":
        yield from rank_answers(job)
    else:
        for fields in job["cases"]:
            case = Case(**{**fields, "shape": tuple(fields["shape"])})
            try:
                yield measure_case(case, job["against"], job["rounds"])
            except RuntimeError as error:  # too little memory on the device, an operation that it lacks
                yield {"failure": str(error).strip().splitlines()[0]}


def measure_case(case: Case, against: Sequence[str], rounds: int) -> dict[str, Any]:
    """Time our layer and the others on a case; a layer of ours that is wrong gets no time.

    The check comes after the timing, because its float64 copies would leave traces in the process's memory.
    """
    given = inputs(case)
    layer = our_layer(case, given)
    backends = {
        "training": backend_of(case, given, training=True),
        "inference": backend_of(case, given, training=False),
    }
    contenders: dict[str, tuple[Callable[..., Tensor], nn.Module]] = {"batchnorm": (layer, layer)}
    skipped: dict[str, str] = {}
    for name in against:
        try:
            contenders[name] = _rival(name, case, given)
        except RuntimeError as error:
            skipped[name] = str(error)
    times = {}
    for task in OPERATIONS:
        functions = {
            name: operation(task, function, module, given) for name, (function, module) in contenders.items()
        }
        times[task] = interleaved(functions, clock_for(case.device), rounds)
    truth = exact(case, given)
    found = {name: errors(function, module, truth) for name, (function, module) in contenders.items()}
    failure = complaint(found["batchnorm"], given.x.dtype, backends["training"])
    return {
        "failure": failure,
        "backends": backends,
        "skipped": skipped,
        "errors": found,
        "times": {} if failure else {task: _plain(timed) for task, timed in times.items()},
    }


def _rival(name: str, case: Case, given: Inputs) -> tuple[Callable[..., Tensor], nn.Module]:
    if name == "compile":
        return compiled(case, given)
    layer = eager(case, given)
    return layer, layer


def _plain(timed: dict[str, Any]) -> dict[str, Any]:
    return {name: asdict(timing) for name, timing in timed.items()}


def host_seconds(device: str, backend: str | None = None, repeats: int = 20) -> dict[str, float]:
    """The host's seconds for one layer with ReLU, forward and backward, in a chain of 50: what launching costs."""
    case = Case("host", _CHAIN_SHAPE, 1, "relu", "contiguous", "float32", device, None, "as-is", backend)
    given = inputs(case)
    found = {}
    for name, build in (("batchnorm", our_layer), ("eager", eager)):
        chain = nn.Sequential(*(build(case, given) for _ in range(_CHAIN)))
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            torch.autograd.grad(chain(given.x), [given.x, *chain.parameters()], given.dy)
            seconds.append((time.perf_counter() - start) / _CHAIN)
            if given.x.is_cuda:
                torch.cuda.synchronize()
        found[name] = median(seconds)
    return found


if __name__ == "__main__":
    main()
