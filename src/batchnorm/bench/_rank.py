"""One of several processes with synchronized layers: all of them time the same calls in step, and check them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchnorm import nn as ours
from batchnorm import ops
from batchnorm.bench import machine
from batchnorm.bench.accuracy import Exact, complaint, errors, exact
from batchnorm.bench.case import Case
from batchnorm.bench.contenders import Inputs, inputs, operation, our_layer, synchronized
from batchnorm.bench.record import OURS, Timing
from batchnorm.bench.suites import EPILOGUES
from batchnorm.bench.timing import Clock, calls_and_samples, clock_for, timing_of

__all__ = ["rank_answers"]

_TASK = "forward+backward"
# A process that has ended is missed after this long at the latest.
_PATIENCE = timedelta(seconds=120)


def rank_answers(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The machine, then what each case takes; the first process's answers are those of all."""
    rank, processes, device = job["rank"], job["processes"], job["device"]
    missing = _missing(device, processes)
    if missing:
        yield {"missing": missing}
        return
    if device != "cpu":
        torch.cuda.set_device(rank)
        device = f"cuda:{rank}"
    default = max(1, torch.get_num_threads() // processes)
    torch.set_num_threads(job["threads"] or default)
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        f"file://{job['meeting']}",
        _PATIENCE,
        world_size=processes,
        rank=rank,
    )
    try:
        yield {"machine": machine.describe(device)}
        for fields in job["cases"]:
            case = Case(**{**fields, "shape": tuple(fields["shape"]), "device": device})
            torch.set_num_threads(case.threads or default)
            yield _measured(case, rank, processes, job["rounds"])
    finally:
        dist.destroy_process_group()


def _missing(device: str, processes: int) -> str:
    """What this machine lacks; empty if nothing."""
    if not dist.is_available():
        return "this PyTorch was built without torch.distributed"
    if device == "cpu":
        return "" if dist.is_gloo_available() else "this PyTorch was built without gloo"
    if not dist.is_nccl_available():
        return "this PyTorch was built without NCCL"
    found = torch.cuda.device_count()
    return "" if found >= processes else f"{processes} processes need as many GPUs, and there are {found}"


def _measured(case: Case, rank: int, processes: int, rounds: int) -> dict[str, Any]:
    """Times, which are those of the slowest process, errors against the whole batch, and what is exchanged."""
    together = replace(case, shape=(case.shape[0] * processes, *case.shape[1:]))
    whole = inputs(together)
    share = slice(rank * case.shape[0], (rank + 1) * case.shape[0])
    given = _part(whole, share)
    layers = {OURS: synchronized(case, given, ours.SyncBatchNorm), "plain": our_layer(case, given)}
    if given.x.is_cuda:
        layers["torch-sync"] = synchronized(case, given, nn.SyncBatchNorm)
    functions = {name: operation(_TASK, layer, layer, given) for name, layer in layers.items()}
    times = _in_step(functions, clock_for(case.device), rounds)
    truth = _part_of_exact(exact(together, whole), share)
    exchanged, found = {}, {}
    for name, layer in layers.items():
        if name == "plain":  # its statistics are its own batch's: nothing to compare with
            continue
        with _listening() as sent:
            functions[name]()
        exchanged[name] = {"collectives": len(sent), "bytes": sum(sent)}
        found[name] = _largest(errors(layer, layer, truth, dist.all_reduce), given.x)
    backend = _backend(case, given)
    failure = complaint(found[OURS], given.x.dtype, backend)
    return {
        "failure": failure,
        "backends": {"training": backend},
        "errors": found,
        "times": {} if failure else {_TASK: {name: asdict(timing) for name, timing in times.items()}},
        "exchanged": exchanged,
    }


def _backend(case: Case, given: Inputs) -> str:
    """Which backend runs our layer: the usual choice among those that take statistics from elsewhere."""
    activation, residual = EPILOGUES[case.epilogue].activation, given.residual is not None
    return ops.choose(given.x, True, activation, residual, False, True, case.backend)


def _part(whole: Inputs, share: slice) -> Inputs:
    def part(x: Tensor) -> Tensor:
        return x.detach()[share].clone()  # in the layout that it has

    residual = None if whole.residual is None else part(whole.residual).requires_grad_()
    return replace(whole, x=part(whole.x).requires_grad_(), dy=part(whole.dy), residual=residual)


def _part_of_exact(truth: Exact, share: slice) -> Exact:
    """What float64 gives for a part of the batch; of the parameters' gradients, for the whole."""
    values = {
        name: value if name in ("dweight", "dbias") else value[share] for name, value in truth.values.items()
    }
    given = _part(truth.given, share)
    return Exact(given, given.dy, values)


def _in_step(functions: Mapping[str, Callable[[], object]], clock: Clock, rounds: int) -> dict[str, Timing]:
    """Time each function in turn, with as many calls in every process; a sample is the slowest one's."""
    plan = {name: calls_and_samples(_slowest_pace(function, clock)) for name, function in functions.items()}
    samples: dict[str, list[list[float]]] = {name: [] for name in functions}
    for number in range(rounds):
        for name in list(functions)[:: -1 if number % 2 else 1]:
            calls, count = plan[name]
            functions[name]()
            taken = []
            for _ in range(count):
                dist.barrier()
                taken.append(clock.sample(functions[name], calls))
            samples[name].append(_maxima(taken))
    return {name: timing_of(each, []) for name, each in samples.items()}


def _slowest_pace(function: Callable[[], object], clock: Clock) -> float:
    clock.sample(function, 2)
    dist.barrier()
    return max(_maxima([clock.sample(function, 2)])[0], 1e-9)


def _maxima(values: list[float]) -> list[float]:
    """The largest of all processes, number by number."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    numbers = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return [float(number) for number in numbers]


def _largest(found: Mapping[str, float], like: Tensor) -> dict[str, float]:
    """The largest error of all processes; NaN, which no maximum keeps, counts as infinite."""
    values = [value if value == value else float("inf") for value in found.values()]
    return dict(zip(found, _maxima(values), strict=True))


@contextmanager
def _listening() -> Iterator[list[int]]:
    """The bytes that this process puts into each collective."""
    sent: list[int] = []
    # Each function with the place of the tensor that is sent.
    names = {"all_reduce": 0, "all_gather": 1, "all_gather_into_tensor": 1, "all_gather_single": 1}
    before = {name: getattr(dist, name) for name in names if hasattr(dist, name)}

    def heard(name: str) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            sent.append(args[names[name]].numel() * args[names[name]].element_size())
            return before[name](*args, **keywords)

        return call

    try:
        for name in before:
            setattr(dist, name, heard(name))
        yield sent
    finally:
        for name, function in before.items():
            setattr(dist, name, function)
