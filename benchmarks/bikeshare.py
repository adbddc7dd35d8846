"""A case where normalizing each batch throws away what one wanted: rented bikes, one day per batch.

    pip install --no-deps islp==0.6.0
    python benchmarks/bikeshare.py [--seeds N] [--epochs N] [--json FILE]

A network with two hidden layers and a batch norm behind each predicts log(1 + bikers) for an hour in Washington,
D.C. (Capital Bikeshare, 2011: 8,645 hours on 365 days), from seven numbers: the hour as sine and cosine, working
day, temperature, felt temperature, humidity, wind. A fifth of the days is held out. It is trained twice from the
same weights: on shuffled batches of 24 hours, and on batches that are one whole day each. The second cannot see
how warm a day is, because that is the batch's mean, which batch norm takes away; and its running statistics are
averages over days that fit no day.

Each network is then tested with three kinds of statistics: the running ones; running ones recalibrated exactly,
which is one pass over all training hours as a single batch (pooled mean and variance, not an average of
variances); and those of the test day itself. The same network without batch norm, trained in both ways, is the
control: it shows how much harm the order of the batches does by itself.
"""

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm
from batchnorm._errors import BatchNormError
from batchnorm._files import write_whole
from batchnorm.comparison.datasets import Hours, bike_hours

SCHEMA_VERSION = 1
INPUTS = Hours.inputs
WIDTH, LR, BATCH = 64, 0.01, 24
TRAININGS = ("shuffled", "by day")
STATISTICS = ("running", "recalibrated", "the day's own")
CONTROL = "no batch norm"


@dataclass(frozen=True)
class Split:
    """The hours of the training days and of the held-out days; `day` numbers each hour's day."""

    x: Tensor
    y: Tensor
    day: Tensor
    x_test: Tensor
    y_test: Tensor
    day_test: Tensor


@dataclass(frozen=True)
class Result:
    """Mean squared test errors of log(1 + bikers), one a seed, for one way of training and testing."""

    training: str
    statistics: str
    errors: list[float]
    mean: float
    spread: float


def main() -> None:
    """Train and test over the seeds, print the table and write the JSON."""
    arguments = parse()
    torch.set_num_threads(1)
    try:
        found = bike_hours()
    except BatchNormError as error:
        sys.exit(f"error: {error}")
    hours, bikers, day = found.x, found.y, found.day
    errors: dict[tuple[str, str], list[float]] = {}
    for seed in range(arguments.seeds):
        split = split_days(hours, bikers, day, seed)
        for training in TRAININGS:
            model = train(split, training, seed, arguments.epochs)
            for statistics in STATISTICS:
                error = test(model, split, statistics)
                errors.setdefault((training, statistics), []).append(error)
                print(f"seed {seed}, trained {training}, tested with {statistics}: {error:.3f}", flush=True)
            plain = train(split, training, seed, arguments.epochs, normalized=False)
            error = test(plain, split, "running")
            errors.setdefault((training, CONTROL), []).append(error)
            print(f"seed {seed}, trained {training}, {CONTROL}: {error:.3f}", flush=True)
    results = [summarize(*key, values) for key, values in errors.items()]
    print(f"\n{'training':<10} {'statistics':<15} {'error':>7} {'± seeds':>8}")
    for result in results:
        print(f"{result.training:<10} {result.statistics:<15} {result.mean:>7.3f} {result.spread:>8.3f}")
    report = {
        "kind": "bikeshare-benchmark",
        "schema_version": SCHEMA_VERSION,
        "machine": machine(),
        "setup": setup(day, hours, arguments.epochs),
        "results": [asdict(result) for result in results],
    }
    write_whole(arguments.json, json.dumps(report, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Batch norm on rented bikes, one day per batch.")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each kind (default: 5)")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training days (default: 20)")
    place = Path(__file__).parent / "results" / "bikeshare.json"
    parser.add_argument("--json", type=Path, default=place, metavar="FILE", help="where the results go")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.epochs < 1:
        parser.error(f"got --seeds {arguments.seeds} --epochs {arguments.epochs}, expected at least 1 each")
    if not arguments.json.resolve().parent.is_dir():
        parser.error(f"got --json {arguments.json}, expected a file in a folder that exists")
    return arguments


def split_days(x: Tensor, y: Tensor, day: Tensor, seed: int) -> Split:
    """Hold out a fifth of the days."""
    days = day.unique()
    order = days[torch.randperm(len(days), generator=torch.Generator().manual_seed(seed))]
    held_out = torch.isin(day, order[: len(days) // 5])
    kept = ~held_out
    return Split(x[kept], y[kept], day[kept], x[held_out], y[held_out], day[held_out])


def network(*, normalized: bool) -> nn.Module:
    """Two hidden layers, with a batch norm behind each or with a bias."""

    def layer(inputs: int) -> list[nn.Module]:
        if normalized:
            return [nn.Linear(inputs, WIDTH, bias=False), batchnorm.BatchNorm1d(WIDTH, activation="relu")]
        return [nn.Linear(inputs, WIDTH), nn.ReLU()]

    return nn.Sequential(*layer(len(INPUTS)), *layer(WIDTH), nn.Linear(WIDTH, 1))


def train(split: Split, training: str, seed: int, epochs: int, *, normalized: bool = True) -> nn.Module:
    """Adam on the mean squared error; both ways of training start from the same weights."""
    torch.manual_seed(seed)
    model = network(normalized=normalized)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in batches(split, training):
            optimizer.zero_grad()
            F.mse_loss(model(split.x[rows]).squeeze(1), split.y[rows]).backward()
            optimizer.step()
        rate.step()
    return model


def batches(split: Split, training: str) -> list[Tensor]:
    """One epoch: the hours shuffled, 24 at a time, or the days shuffled, one at a time."""
    if training == "shuffled":
        order = torch.randperm(len(split.x))
        return list(order[: len(order) // BATCH * BATCH].split(BATCH))
    days = members(split.day)
    return [days[index] for index in torch.randperm(len(days)).tolist() if len(days[index]) > 1]


def members(day: Tensor) -> list[Tensor]:
    """The rows of each day."""
    return [(day == number).nonzero().flatten() for number in day.unique()]


def test(model: nn.Module, split: Split, statistics: str) -> float:
    """The mean squared error on the held-out days with one kind of statistics."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        if statistics == "recalibrated":
            recalibrate(model, split.x)
        model.train(statistics == "the day's own")
        squares = [
            (model(split.x_test[rows]).squeeze(1) - split.y_test[rows]).square()
            for rows in members(split.day_test)
            if len(rows) > 1
        ]
    model.load_state_dict(kept)
    return torch.cat(squares).mean().item()


def recalibrate(model: nn.Module, x: Tensor) -> None:
    """Put the pooled mean and variance of all training hours into the running statistics, in one batch."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.reset_running_stats()
            layer.momentum = None  # the plain average over batches: here, of one
    model.train()
    model(x)


def summarize(training: str, statistics: str, errors: list[float]) -> Result:
    values = torch.tensor(errors, dtype=torch.float64)
    spread = values.std().item() if len(errors) > 1 else 0.0
    return Result(training, statistics, [round(value, 6) for value in errors], values.mean().item(), spread)


def setup(day: Tensor, x: Tensor, epochs: int) -> dict[str, object]:
    """What was trained, and how much of the temperature's variance lies between days."""
    temperature = x[:, INPUTS.index("temp")].double()
    between = torch.cat([temperature[rows].mean().expand(len(rows)) for rows in members(day)])
    return {
        "data": "ISLP/data/Bikeshare.csv of islp 0.6.0",
        "hours": len(x),
        "days": len(day.unique()),
        "inputs": list(INPUTS),
        "target": "log(1 + bikers)",
        "hidden": [WIDTH, WIDTH],
        "optimizer": f"Adam, learning rate {LR} on a cosine",
        "epochs": epochs,
        "temperature_variance_between_days": between.var().item() / temperature.var().item(),
    }


def machine() -> dict[str, str | int]:
    """What the numbers depend on."""
    models = []
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "batchnorm": batchnorm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
