"""What the members of the family cost: a training step of one layer, against plain batch norm of the same shape.

    python benchmarks/family_cost.py [--docs] [--no-run]

Forward and backward of one layer on two shapes, every member in turn within each round, the median of the rounds. The
results go to benchmarks/results/family_cost.json; --docs writes the table of docs/family.md.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pages
import torch
from torch import Tensor, nn

import batchnorm

PAGE = pages.DOCS / "family.md"
SHAPES = {"images, 32×64×28×28": (32, 64, 28, 28), "table, 1024×128": (1024, 128)}
ROUNDS, THREADS = 31, 2

Step = Callable[[], None]


def main() -> None:
    pages.main("family_cost", __doc__.splitlines()[0], one_run, tables, PAGE, seeds=1)


def members(channels: int, images: bool) -> dict[str, nn.Module]:
    """The layers, as they are used: their constructor's words are the table's."""
    return {
        "torch.nn": (nn.BatchNorm1d, nn.BatchNorm2d)[images](channels),
        "BatchNorm": (batchnorm.BatchNorm1d, batchnorm.BatchNorm2d)[images](channels),
        "GhostBatchNorm": batchnorm.GhostBatchNorm(channels, splits=4),
        "BatchRenorm": batchnorm.BatchRenorm(channels, r_max=3, d_max=5),
        "FrozenBatchNorm": batchnorm.FrozenBatchNorm(channels),
        "DomainBatchNorm": batchnorm.DomainBatchNorm(channels, domains=("a", "b"), default="a"),
        "ConditionalBatchNorm": batchnorm.ConditionalBatchNorm(channels, 10),
        "VirtualBatchNorm": batchnorm.VirtualBatchNorm(channels),
        "WhitenedBatchNorm": batchnorm.WhitenedBatchNorm(channels, group_size=16),
    }


def one_run(seed: int) -> pages.Run:
    """Milliseconds a step of every member on every shape."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(seed)
    found: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        x, dy = torch.randn(2, *shape)
        layers = members(shape[1], len(shape) == 4)
        with batchnorm.reference_batch(layers["VirtualBatchNorm"], graph=False):
            layers["VirtualBatchNorm"](x)
        steps = {member: step(layer, x, dy) for member, layer in layers.items()}
        times: dict[str, list[float]] = {member: [] for member in steps}
        for _ in range(ROUNDS):
            for member, run in steps.items():
                run()
                start = time.perf_counter()
                run()
                times[member].append(1e3 * (time.perf_counter() - start))
        found[name] = {member: statistics.median(each) for member, each in times.items()}
    return {"milliseconds": found}


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> Step:
    """Forward and backward of one layer in training."""
    given = x.clone().requires_grad_()
    labels = torch.arange(len(x)) % 10
    more = (labels,) if isinstance(layer, batchnorm.ConditionalBatchNorm) else ()

    def run() -> None:
        given.grad = None
        layer(given, *more).backward(dy)

    return run


def tables(runs: list[pages.Run]) -> dict[str, str]:
    """The page's table: a step against plain batch norm of this package."""
    times = runs[-1]["milliseconds"]
    head = (
        "| layer | " + " | ".join(f"{shape}" for shape in SHAPES) + " |\n|---|" + "---|" * len(SHAPES) + "\n"
    )
    rows = ""
    for member in next(iter(times.values())):
        cells = []
        for shape in SHAPES:
            own, plain = times[shape][member], times[shape]["BatchNorm"]
            cells.append(f"{own:.2f} ms" if member == "BatchNorm" else f"{own / plain:.1f}×")
        rows += f"| {member} | {' | '.join(cells)} |\n"
    return {"cost": head + rows}


if __name__ == "__main__":
    main()
