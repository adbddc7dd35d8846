"""One process of the distributed tests: recalibration of a share of the batches."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from stats_helpers import Branches
from torch import Tensor, nn

import batchnorm

# What each of two processes has, in batches of so many samples. The second case leaves one without any.
SHARES = {"uneven": ((5, 9, 3, 4), (6, 1)), "empty": ((5, 9, 3), ()), "many": ((8,) * 40, (8,) * 25)}


def batches(case: str, rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + rank)
    return [
        torch.randn(size, 2, 6, 5, generator=generator) * (1 + rank) + 3 * rank for size in SHARES[case][rank]
    ]


def network() -> nn.Module:
    torch.manual_seed(5)
    return Branches()


def run(rank: int) -> dict[str, object]:
    results: dict[str, object] = {}
    for case in SHARES:
        for mode in ("joint", "sequential"):
            model = network()
            result = batchnorm.recalibrate(model, batches(case, rank), mode=mode, tolerance=0)
            results[f"{case} {mode}"] = (model.state_dict(), result.to_dict())
    model = network()
    result = batchnorm.recalibrate(model, batches("many", rank), samples=100)
    results["samples"] = (model.state_dict(), result.to_dict())
    model = nn.Sequential(nn.BatchNorm2d(2))
    data = [torch.randn(8, 2, 6, 5, generator=torch.Generator().manual_seed(9 * k + rank)) for k in range(60)]
    result = batchnorm.recalibrate(model, data, tolerance=0.05)
    results["tolerance"] = (model.state_dict(), result.to_dict())
    alone = network()
    batchnorm.recalibrate(alone, batches("uneven", rank), group=False)
    results["alone"] = (alone.state_dict(), {})
    results["wrapped"] = wrapped(rank)
    results["failed"] = failed(rank)
    results["different"] = different(rank)
    return results


def wrapped(rank: int) -> tuple[dict[str, Tensor], dict[str, object]]:
    model = nn.parallel.DistributedDataParallel(network())
    result = batchnorm.recalibrate(model, batches("uneven", rank))
    return model.module.state_dict(), result.to_dict()


def failed(rank: int) -> tuple[str, bool]:
    """One process fails in its second batch; both must end, and with the model as it was."""
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data: list[object] = list(batches("many", rank))
    if rank == 1:
        data[1] = "no batch"
    try:
        batchnorm.recalibrate(model, data)
    except batchnorm.BatchNormError as error:
        return str(error), all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return "", False


def different(rank: int) -> str:
    model = network() if rank else nn.Sequential(nn.BatchNorm2d(2))
    try:
        batchnorm.recalibrate(model, batches("uneven", rank))
    except batchnorm.ModelError as error:
        return str(error)
    return ""


def main(rank: int, folder: Path) -> None:
    where = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", where, timedelta(seconds=60), 2, rank)
    try:
        torch.save(run(rank), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
