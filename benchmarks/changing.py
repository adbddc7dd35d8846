"""What the operations on a model do to it: before and after, on handwritten digits.

    python benchmarks/changing.py [--seeds N] [--again] [--docs] [--no-run]

The network of digit_runs.py, with a bias before every batch norm, is trained on MNIST's digits and folded, converted,
freed of those biases, and fine-tuned on a few of scikit-learn's digits with and without frozen batch norms.
"""

import copy
import math
from typing import Any

import pages
import torch
from digit_runs import BATCH, Digits, accuracy, digits, largest_difference, mnist_parts, network, train
from torch import nn
from torch.nn import functional as F

import batchnorm

PAGE = pages.DOCS / "changing.md"
STEPS, LR, DECAY = 600, 0.1, 5e-4
LABELLED, TUNING = 100, 200
BATCHES, LRS = (2, 8), (0.001, 0.01)


def main() -> None:
    pages.main("changing", __doc__.splitlines()[0], run, tables, PAGE, seeds=5)


def run(seed: int) -> dict[str, Any]:
    return one_seed(seed, *mnist_parts(), digits())


def one_seed(seed: int, source: Digits, alike: Digits, target: Digits) -> dict[str, Any]:
    """Train on `source`; test on digits that are `alike`, and on those of the `target`."""
    model, gradient = with_biases(seed, source)
    mixed = torch.randperm(len(target[1]), generator=torch.Generator().manual_seed(seed))
    few, rest = mixed[:LABELLED], mixed[LABELLED:]
    tuned, test = (target[0][few], target[1][few]), (target[0][rest], target[1][rest])
    own = source[0][few], source[1][few]
    return {
        "same": same(model, target),
        "gradient": gradient,
        "halfway": {to: halfway(seed, source, alike, to) for to in ("", "batchnorm")},
        "poisoned": poisoned(model, source, alike),
        "before": {"target": accuracy(model, [test]), "alike": accuracy(model, [alike])},
        "tuned": {
            kind: {
                str(size): {f"{lr:g}": fine_tuned(model, *data, size, lr, seed) for lr in LRS}
                for size in BATCHES
            }
            for kind, data in {"target": (tuned, test), "alike": (own, alike)}.items()
        },
    }


def with_biases(seed: int, data: Digits) -> tuple[nn.Module, float]:
    """The trained network, and the largest gradient of a bias before a batch norm against that of its weight."""
    torch.manual_seed(seed)
    model = network(bias=True)
    optimizer = sgd(model)
    ratios: list[float] = []

    def look() -> None:
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                ratios.append(float(layer.bias.grad.abs().max() / layer.weight.grad.abs().max()))

    train(model, data, optimizer, STEPS, after=look)
    return model.eval(), max(ratios)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(batchnorm.parameter_groups(model, DECAY), lr=LR, momentum=0.9)


def same(model: nn.Module, target: Digits) -> dict[str, dict[str, float]]:
    """What each operation changes: outputs, predictions, layers, parameters."""
    x, _ = target
    changed = {
        "fold": batchnorm.fold(model, x[:8]).model,
        "freeze": batchnorm.freeze(model).model,
        "convert": batchnorm.convert(model, "batchnorm").model,
        "absorb_bias": batchnorm.absorb_bias(model, x[:8]).model,
    }
    with torch.no_grad():
        before = model(x).argmax(1)
        return {
            name: {
                "error": largest_difference(model, other, x),
                "others": int((other(x).argmax(1) != before).sum()),
                "accuracy": accuracy(other, [target]) - accuracy(model, [target]),
                "norms": sum(isinstance(m, nn.BatchNorm2d) for m in other.modules()),
                "trained": sum(p.numel() for p in other.parameters() if p.requires_grad),
            }
            for name, other in {"": model, **changed}.items()
        }


def halfway(seed: int, source: Digits, test: Digits, to: str) -> float:
    """Half a training, the conversion in place, the other half with the same optimizer."""
    torch.manual_seed(seed)
    model = network()
    optimizer = sgd(model)
    train(model, source, optimizer, STEPS // 2)
    if to:
        batchnorm.convert(model, to, inplace=True)
    train(model, source, optimizer, STEPS - STEPS // 2)
    return accuracy(model.eval(), [test])


def poisoned(model: nn.Module, source: Digits, test: Digits) -> dict[str, float]:
    """One batch with one broken image, in a loop that leaves out steps whose loss is not finite."""
    found = {"before": accuracy(model, [test])}
    for name, options in {"torch": {}, "batchnorm": {"nonfinite": "skip"}}.items():
        other = batchnorm.convert(model, name, **options).model.train()
        x, y = source[0][:BATCH].clone(), source[1][:BATCH]
        x[0] = math.nan
        optimizer = sgd(other)
        loss = F.cross_entropy(other(x), y)
        if loss.isfinite():
            loss.backward()
            optimizer.step()
        found[name] = accuracy(other.eval(), [test])
    return found


def fine_tuned(
    model: nn.Module, few: Digits, test: Digits, size: int, lr: float, seed: int
) -> dict[str, float]:
    """All weights trained on a few digits, with the batch norms as they are or frozen."""
    found = {}
    for name in TUNED:
        torch.manual_seed(seed)
        other = copy.deepcopy(model).train()
        if name == "recalibrated":
            batchnorm.recalibrate(other, [few[0]], tolerance=0)
        if name != "moving":
            batchnorm.freeze(other, affine=name == "both", inplace=True)
        parameters = [p for p in other.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
        train(other, few, optimizer, TUNING, batch=size)
        found[name] = accuracy(other.eval(), [test])
    return found


TUNED = {
    "moving": "not frozen",
    "statistics": "`freeze(model, affine=False)`",
    "both": "`freeze(model)`",
    "recalibrated": "`recalibrate` on them, then `freeze(model, affine=False)`",
}
KINDS = {"target": "another scanner's digits", "alike": "its own kind"}
SAME = {
    "": "as trained",
    "fold": "`fold(model, example)`",
    "freeze": "`freeze(model)`",
    "convert": '`convert(model, "batchnorm")`',
    "absorb_bias": "`absorb_bias(model, example)`",
}


def tables(runs: list[dict[str, Any]]) -> dict[str, str]:
    return {
        "same": outputs(runs),
        "freeze": tuning(runs),
        "convert": converting(runs),
        "absorb": absorbing(runs),
    }


def outputs(runs: list[dict[str, Any]]) -> str:
    rows = []
    for name, title in SAME.items():
        found = [run["same"][name] for run in runs]
        error = f"{max(each['error'] for each in found):.1g}" if name else ""
        others = str(max(each["others"] for each in found)) if name else ""
        rows.append([title, error, others, str(found[0]["norms"]), f"{found[0]['trained']:,}"])
    head = ["", "largest change of an output", "other predictions of 1,797", "batch norms", "trained numbers"]
    return pages.markdown(head, rows)


def tuning(runs: list[dict[str, Any]]) -> str:
    columns = [(kind, size) for kind in KINDS for size in BATCHES]
    rows = [
        ["not fine-tuned", *(pages.percent([run["before"][kind] for run in runs]) for kind, _ in columns)]
    ]
    best = {name: [tuned(runs, name, *column) for column in columns] for name in TUNED}
    for name, title in TUNED.items():
        rows.append([title, *(f"{pages.percent(values)}, rate {lr}" for lr, values in best[name])])
    for name in ("statistics", "recalibrated"):
        pairs = zip(best[name], best["moving"], strict=True)
        cells = [pages.points(values, others) for (_, values), (_, others) in pairs]
        rows.append([f"{TUNED[name]}, against not frozen, points", *cells])
    head = [f"{KINDS[kind]}, batches of {size}" for kind, size in columns]
    return pages.markdown(["batch norms", *head], rows)


def tuned(runs: list[dict[str, Any]], name: str, kind: str, size: int) -> tuple[str, list[float]]:
    """The learning rate that is best over all runs, and what came out with it."""
    found = {f"{lr:g}": [run["tuned"][kind][str(size)][f"{lr:g}"][name] for run in runs] for lr in LRS}
    return max(found.items(), key=lambda item: sum(item[1]))


def converting(runs: list[dict[str, Any]]) -> str:
    pairs = {
        "converted halfway through a training": [
            [run["halfway"][to] for run in runs] for to in ("", "batchnorm")
        ],
        "one broken image in training": [
            [run["poisoned"][name] for run in runs] for name in ("torch", "batchnorm")
        ],
    }
    rows = [
        [title, pages.percent(plain), pages.percent(converted), pages.points(converted, plain)]
        for title, (plain, converted) in pairs.items()
    ]
    return pages.markdown(["accuracy", "`torch.nn`", "converted", "difference, points"], rows)


def absorbing(runs: list[dict[str, Any]]) -> str:
    before, after = (runs[0]["same"][name]["trained"] for name in ("", "absorb_bias"))
    error = max(run["same"]["absorb_bias"]["error"] for run in runs)
    rows = [
        ["biases before a batch norm", f"{before - after}", "0"],
        ["the largest gradient of one", f"{max(run['gradient'] for run in runs):.0e}", "none"],
        ["change of an output", "", f"{error:.0e}"],
    ]
    return pages.markdown(["", "before", "`absorb_bias(model)`"], rows)


if __name__ == "__main__":
    main()
