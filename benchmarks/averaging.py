"""Averaged weights, and where the statistics of their batch norms come from.

    python benchmarks/averaging.py [--seeds N] [--again] [--docs] [--no-run]

The network of digit_runs.py on 4,000 of MNIST's digits at a learning rate that stays; its weights are averaged equally
over the last part of the training (SWA) and exponentially over all of it (EMA). Tested on 1,000 other digits.
"""

import copy
from typing import Any

import pages
import torch
from digit_runs import Digits, accuracy, mnist_parts, network, train
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import batchnorm

PAGE = pages.DOCS / "averaging.md"
STEPS, START, EVERY, LR, DECAY = 600, 300, 25, 0.1, 0.98
NAMES = {
    "last": "the last weights, not averaged",
    "torch": "`AveragedModel(model)`: statistics of the last model",
    "buffers": "`AveragedModel(model, use_buffers=True)`: all buffers averaged",
    "averaged": "`batchnorm.averaged(model)`",
    "update_bn": "`AveragedModel(model)`, then `update_bn`",
    "recalibrated": "`batchnorm.averaged(model)`, then `recalibrate`",
}


def main() -> None:
    pages.main("averaging", __doc__.splitlines()[0], run, tables, PAGE)


def run(seed: int) -> dict[str, Any]:
    return one_seed(seed, *mnist_parts())


def one_seed(seed: int, data: Digits, test: Digits) -> dict[str, Any]:
    """Train once with every average beside it, and test all of them."""
    torch.manual_seed(seed)
    model = network()
    averages = {"SWA": made(model, None), "EMA": made(model, DECAY)}
    optimizer = torch.optim.SGD(batchnorm.parameter_groups(model, 5e-4), lr=LR, momentum=0.9)
    step = 0

    def average() -> None:
        nonlocal step
        step += 1
        for kind, found in averages.items():
            if kind == "EMA" or (step > START and step % EVERY == 0):
                for each in found.values():
                    each.update_parameters(model)

    train(model, data, optimizer, STEPS, after=average)
    batches = list(zip(data[0].split(64), data[1].split(64), strict=True))
    result: dict[str, Any] = {"accuracy": {}}
    for kind, found in averages.items():
        tested = {"last": accuracy(model.eval(), [test])}
        tested |= {name: accuracy(each.eval(), [test]) for name, each in found.items()}
        tested["update_bn"] = accuracy(updated(found["torch"], batches), [test])
        exact = copy.deepcopy(found["averaged"])
        batchnorm.recalibrate(exact, batches, tolerance=0)
        tested["recalibrated"] = accuracy(exact, [test])
        result["accuracy"][kind] = tested
    return result


def made(model: nn.Module, decay: float | None) -> dict[str, AveragedModel]:
    rule = None if decay is None else get_ema_multi_avg_fn(decay)
    return {
        "torch": AveragedModel(model, multi_avg_fn=rule),
        "buffers": AveragedModel(model, multi_avg_fn=rule, use_buffers=True),
        "averaged": batchnorm.averaged(model, decay=decay),
    }


def updated(average: AveragedModel, batches: list[Digits]) -> nn.Module:
    other = copy.deepcopy(average)
    update_bn(batches, other)
    return other.eval()


def tables(runs: list[dict[str, Any]]) -> dict[str, str]:
    kinds = ("SWA", "EMA")
    found = {name: {kind: [run["accuracy"][kind][name] for run in runs] for kind in kinds} for name in NAMES}
    head = ["weights", *kinds, *(f"{kind} against `AveragedModel(model)`, points" for kind in kinds)]
    rows = []
    for name, title in NAMES.items():
        against = ["" if name == "torch" else pages.points(found[name][k], found["torch"][k]) for k in kinds]
        rows.append([title, *(pages.percent(found[name][kind]) for kind in kinds), *against])
    return {"averages": pages.markdown(head, rows)}


if __name__ == "__main__":
    main()
