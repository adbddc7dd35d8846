"""One process of the distributed test: a layer under DistributedDataParallel, trained on a share of the batches."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import batchnorm

WORLD, STEPS, SHAPE = 2, 3, (6, 3, 4)


def share(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of a rank and the gradient of its output."""
    x, dy = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(10 * step + rank))
    return x + rank, dy


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv1d(3, 3, 1), batchnorm.BatchNorm1d(3, activation="silu", backend="reference"))


def main(rank: int, folder: Path) -> None:
    where = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", where, timedelta(seconds=60), WORLD, rank)
    model = nn.parallel.DistributedDataParallel(network())
    gradients = []
    for step in range(STEPS):
        x, dy = share(rank, step)
        model.zero_grad()
        model(x).backward(dy)
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.save({"gradients": gradients, "state": model.module.state_dict()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
