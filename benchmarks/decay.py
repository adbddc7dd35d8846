"""Weight decay on everything, or not on γ, β and biases.

    python benchmarks/decay.py [--seeds N] [--again] [--docs] [--no-run]

The network of digit_runs.py on 4,000 of MNIST's digits, tested on 1,000 others; both ways start from the same weights
and see the same batches.
"""

from typing import Any

import pages
import torch
from digit_runs import Digits, accuracy, mnist_parts, network, train
from torch import nn

import batchnorm

PAGE = pages.DOCS / "weight-decay.md"
STEPS = 600
DECAYS = (5e-4, 5e-3, 5e-2)


def main() -> None:
    pages.main("decay", __doc__.splitlines()[0], run, tables, PAGE)


def run(seed: int) -> dict[str, Any]:
    return one_seed(seed, *mnist_parts())


def one_seed(seed: int, data: Digits, test: Digits) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for decay in DECAYS:
        for name in ("all", "groups"):
            torch.manual_seed(seed)
            model = network()
            parameters = (
                batchnorm.parameter_groups(model, decay)
                if name == "groups"
                else [{"params": list(model.parameters()), "weight_decay": decay}]
            )
            optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
            train(model, data, optimizer, STEPS, after=schedule.step)
            found = {"accuracy": accuracy(model.eval(), [test]), "gamma": gamma(model)}
            result.setdefault(f"{decay:g}", {})[name] = found
    return result


def gamma(model: nn.Module) -> float:
    """The mean |γ|, which begins at 1."""
    values = [m.weight.detach().abs() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    return float(torch.cat(values).mean())


def tables(runs: list[dict[str, Any]]) -> dict[str, str]:
    rows = []
    for decay in (f"{each:g}" for each in DECAYS):
        found = {
            name: {key: [run[decay][name][key] for run in runs] for key in ("accuracy", "gamma")}
            for name in ("all", "groups")
        }
        every, groups = found["all"]["accuracy"], found["groups"]["accuracy"]
        sizes = [f"{sum(found[name]['gamma']) / len(runs):.2f}" for name in ("all", "groups")]
        rows.append(
            [
                decay,
                pages.percent(every),
                pages.percent(groups),
                pages.points(groups, every),
                ", ".join(sizes),
            ]
        )
    head = ["weight decay", "on everything", "`parameter_groups`", "difference, points", "mean γ"]
    return {"decay": pages.markdown(head, rows)}


if __name__ == "__main__":
    main()
