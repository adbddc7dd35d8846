"""One process of the tests of SyncBatchNorm: it runs every case on its share of the batch and saves what came of it."""

import copy
import importlib
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import processes
import torch
import torch.distributed as dist
from sync_cases import CASES, CHANNELS, Case, gathering, run_case
from torch import Tensor, nn

import batchnorm
from batchnorm.policies import sync


def cases(rank: int, world: int, device: str) -> dict[str, Any]:
    """Every case on both ways of exchange."""
    found = {f"gather: {name}": run_case(case, rank, world, device) for name, case in CASES.items()}
    with gathering(1):
        found |= {f"reduce: {name}": run_case(case, rank, world, device) for name, case in CASES.items()}
    return found


def statistics(rank: int, world: int) -> dict[str, Tensor]:
    """mean and variance at 10⁴ σ on both ways, and with the pivot where it belongs."""
    x = offset_share(rank)
    count = torch.tensor([[float(len(x))]], dtype=torch.float64)
    mean = x.mean(0, keepdim=True)
    arguments = (mean, (x - mean).square().sum(0, keepdim=True), count)
    near = (x.new_full((CHANNELS,), 1e4), x.new_ones(CHANNELS))
    found = {}
    for name, most, running in (("gather", 64, near), ("far", 1, (None, None)), ("near", 1, near)):
        with gathering(most):
            policy = sync.Synced(None, running, "error")
            policy.parts(x.shape)
            found[name] = torch.cat(policy.statistics(*arguments)[:2])
    return found


def offset_share(rank: int) -> Tensor:
    """A process's part of numbers with a mean of 10⁴ σ."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(50 + rank, CHANNELS, generator=generator, dtype=torch.float64) + 1e4


def network() -> nn.Module:
    """Layers under DistributedDataParallel."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv1d(3, 4, 1), batchnorm.SyncBatchNorm(4, activation="silu"), nn.Flatten(), nn.Linear(24, 2)
    )


def share(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """A process's batch for it."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    size = 2 + 3 * rank
    return torch.randn(size, 3, 6, generator=generator) + rank, torch.randn(size, 2, generator=generator)


def wrapped(rank: int) -> dict[str, Any]:
    """Three steps under DistributedDataParallel."""
    model = nn.parallel.DistributedDataParallel(network())
    gradients = []
    for step in range(3):
        x, dy = share(rank, step)
        model.zero_grad()
        model(x).backward(dy)
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    return {"gradients": gradients, "state": model.module.state_dict()}


def group_of_some(rank: int, world: int) -> dict[str, Any]:
    """The first and the last process work together, and those between alone."""
    group = dist.new_group(sorted({0, world - 1}))
    layer = batchnorm.SyncBatchNorm(CHANNELS, process_group=group)
    x = Case().tensors(0, world)[rank]["x"]
    found = {"y": layer(x).detach(), "var": layer.running_var.clone()}
    twin = copy.deepcopy(layer)
    found["same group"] = twin.process_group is layer.process_group and twin.weight is not layer.weight
    found["twin"] = twin(x).detach()
    found["repr"] = repr(layer)
    return found


def collectives(rank: int) -> dict[str, list[str]]:
    """The collectives of each phase."""
    called: list[str] = []
    names = [
        "all_gather_into_tensor",
        "all_gather_single",
        "all_reduce",
        "all_gather",
        "all_gather_object",
        "broadcast",
        "barrier",
    ]
    names += ["reduce", "gather", "scatter", "reduce_scatter", "all_to_all", "send", "recv", "gather_object"]
    before = {name: getattr(dist, name) for name in names if hasattr(dist, name)}  # "single" from 2.13 on

    def told(name: str) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            called.append(name)
            return before[name](*args, **keywords)

        return call

    found = {}
    try:
        for name in before:
            setattr(dist, name, told(name))
        for way, most in (("gather", 64), ("reduce", 1)):
            layer = batchnorm.SyncBatchNorm(CHANNELS, activation="relu")
            untracked = batchnorm.SyncBatchNorm(CHANNELS, track_running_stats=False).eval()
            x = torch.randn(4, CHANNELS, 3, requires_grad=True)
            with gathering(most):
                y = layer(x)
                found[f"{way} forward"], called[:] = list(called), []
                y.square().mean().backward()
                found[f"{way} backward"], called[:] = list(called), []
                layer.eval()(x).square().mean().backward()
                untracked(x).square().mean().backward()
                found[f"{way} eval"], called[:] = list(called), []
    finally:
        for name, function in before.items():
            setattr(dist, name, function)
    return found


def mpi(rank: int) -> Tensor:
    """What a backend without all_gather_into_tensor gets."""
    before = dist.get_backend
    dist.get_backend = lambda group=None: "mpi"
    try:
        return batchnorm.SyncBatchNorm(CHANNELS)(Case().tensors(0, dist.get_world_size())[rank]["x"]).detach()
    finally:
        dist.get_backend = before


def single(rank: int) -> dict[str, Any]:
    """One value per channel in all processes together, and one in each."""
    found: dict[str, Any] = {}
    x = torch.full((1 if rank == 0 else 0, 3), 7.0, requires_grad=True)
    for rule in ("error", "zero", "running"):
        for way, most in (("gather", 64), ("reduce", 1)):
            # A plain average divides by the counter, which "running" leaves at 0.
            layer = batchnorm.SyncBatchNorm(3, momentum=None if rule == "running" else 0.1, single=rule)
            layer.running_mean.fill_(5.0)
            layer.running_var.fill_(4.0)
            layer.bias.data.fill_(0.25)
            with gathering(most):
                try:
                    y = layer(x)
                except batchnorm.InputError as error:
                    found[f"{rule} {way}"] = str(error)
                    continue
                (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
            found[f"{rule} {way}"] = (y.detach(), dx, {k: v.clone() for k, v in layer.named_buffers()})
    layer = batchnorm.SyncBatchNorm(3, single="running", track_running_stats=False)
    found["running without"] = error_of(lambda: layer(x))
    one = batchnorm.SyncBatchNorm(3)(torch.full((1, 3), float(rank)))
    masked = batchnorm.SyncBatchNorm(3)(torch.full((2, 3), 7.0), mask=torch.tensor([rank == 0, False]))
    return found | {"one each": one.detach(), "one valid": masked.detach()}


def error_of(call: Callable[[], object]) -> str:
    """The kind and text of the error that a call ends with."""
    try:
        call()
    except batchnorm.BatchNormError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def refused(rank: int) -> dict[str, str]:
    """What cannot be done with others."""
    layer = batchnorm.SyncBatchNorm(3)
    x = torch.randn(4, 3, requires_grad=True)
    found = {}
    y = layer(x)
    found["second"] = error_of(lambda: torch.autograd.grad(y.square().sum(), x, create_graph=True))
    found["func"] = error_of(lambda: torch.func.grad(lambda x: layer(x).square().sum())(x))
    found["vmap"] = error_of(lambda: torch.func.vmap(layer)(x[None]))
    found["group"] = error_of(lambda: batchnorm.SyncBatchNorm(3, process_group="all"))
    with gathering(1):
        other = batchnorm.SyncBatchNorm(3)
        other.running_mean[1] = 1e-6 * rank
        found["pivots"] = error_of(lambda: other(x))
        other.running_mean[1] = -0.0 if rank else 0.0
        other.running_mean[2] = float("nan")
        found["same pivots"] = error_of(lambda: other(x))
        found["finite"] = str(bool(other.running_var.isfinite().all()))
        alone = batchnorm.SyncBatchNorm(3, track_running_stats=False)
        found["no pivot"] = error_of(lambda: alone(x))
    return found


def poisoned(rank: int) -> dict[str, Any]:
    """A NaN in one channel of one process."""
    found = {}
    for name, value in (("clean", 0.0), ("poisoned", float("nan"))):
        for way, most in (("gather", 64), ("reduce", 1)):
            layer = batchnorm.SyncBatchNorm(CHANNELS, nonfinite="skip")
            x = torch.randn(6, CHANNELS, 4, generator=torch.Generator().manual_seed(rank))
            if rank == 0:
                x[2, 1, 3] = value
            x.requires_grad_()
            with gathering(most):
                y = layer(x)
                (dx,) = torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel()).view_as(y))
            found[f"{name} {way}"] = (y.detach(), dx, layer.running_mean.clone(), layer.running_var.clone())
    return found


def constants(rank: int) -> dict[str, Tensor]:
    """Channels of one value each, far from the pivot: what is left of their variance is rounding alone."""
    values = torch.logspace(3, 8, 64, dtype=torch.float64).expand(3 + rank, 64).contiguous()
    found = {}
    for way, most in (("gather", 64), ("reduce", 1)):
        with gathering(most):
            found[way] = batchnorm.SyncBatchNorm(64, dtype=torch.float64)(values).detach()
    return found


def converted(rank: int) -> dict[str, Any]:
    """There and back by convert, with a group."""
    group = dist.new_group()
    torch.manual_seed(7)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), batchnorm.BatchNorm2d(4, activation="relu"), nn.BatchNorm2d(4))
    x = torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(rank))
    synced = batchnorm.convert(model, "sync", process_group=group).model
    found: dict[str, Any] = {"x": x, "state": copy.deepcopy(model.state_dict()), "y": synced(x).detach()}
    found["group"] = [layer.process_group is group for layer in synced[1:]]
    back = batchnorm.convert(synced, "batchnorm").model
    again = batchnorm.convert(synced, "torch")
    found["back"] = [type(layer) is batchnorm.BatchNorm2d for layer in back[1:]]
    found["no group"] = not any("process_group" in vars(layer) for layer in back.modules())
    found["torch"] = (type(again.model[2]) is nn.BatchNorm2d, [each.reason for each in again.skipped])
    return found


def everything(rank: int, world: int, device: str = "cpu") -> dict[str, Any]:
    """What a process has to tell."""
    found: dict[str, Any] = {"cases": cases(rank, world, device)}
    if device != "cpu":
        return found
    found |= {"statistics": statistics(rank, world), "wrapped": wrapped(rank)}
    found |= {"some": group_of_some(rank, world), "collectives": collectives(rank), "mpi": mpi(rank)}
    found |= {"single": single(rank), "refused": refused(rank), "poisoned": poisoned(rank)}
    found |= {"converted": converted(rank), "constants": constants(rank)}
    return found


def main(rank: int, world: int, folder: Path, device: str = "cpu", task: str = "") -> None:
    where = f"file://{folder / 'rendezvous'}"
    if device == "cuda":  # one each; "cuda:0" is one for all, between whose processes gloo copies
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", where, timedelta(seconds=60), world_size=world, rank=rank
    )
    before = torch.are_deterministic_algorithms_enabled()
    # torch.empty gives NaN: what an exchange forgets to fill cannot look right by luck.
    torch.use_deterministic_algorithms(True, warn_only=device != "cpu")
    try:
        # Another module's task: compilers are slow, and mistakes take their time-outs.
        run = getattr(importlib.import_module("sync_tasks"), task) if task else everything
        torch.save(run(rank, world) if task else run(rank, world, device), folder / f"{rank}.pt")
    finally:
        torch.use_deterministic_algorithms(before)
        dist.destroy_process_group()


def together(world: int, folder: Path, device: str = "cpu", task: str = "") -> list[dict[str, Any]]:
    """What all processes found."""
    processes.together(Path(__file__), world, str(world), str(folder), device, task)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
