"""Networks trained in several places, merged: the statistics of their batch norms by three rules.

    python benchmarks/merging.py [--seeds N] [--again] [--docs] [--no-run]

Federated averaging on MNIST's digits: in each round five clients train the common network on their own digits, and what
they send back is averaged. In one way every client has two of the ten classes, in the other a random fifth of all
digits. The weights are the same for every rule; only the running statistics differ.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pages
import torch
from digit_runs import Digits, accuracy, mnist_parts, network, train
from torch import Tensor, nn

import batchnorm

PAGE = pages.DOCS / "merging.md"
ROUNDS, STEPS, CLIENTS, LR = 20, 10, 5, 0.05
EPS = 1e-5  # the layers' own: a channel that is always 0 has no σ to be wrong about
SHARDS = {"two classes a client": "skewed", "a random fifth a client": "mixed"}
NAMES = {
    "naive": "averages of means and of variances",
    "merged": "`merge_statistics`",
    "recalibrated": "`recalibrate` on the digits of all clients",
}


def main() -> None:
    pages.main("merging", __doc__.splitlines()[0], run, tables, PAGE)


def run(seed: int) -> dict[str, Any]:
    return one_seed(seed, *mnist_parts())


def one_seed(seed: int, data: Digits, test: Digits) -> dict[str, Any]:
    result: dict[str, Any] = {"accuracy": {}, "sigma": {}}
    for way in SHARDS.values():
        torch.manual_seed(seed)
        parts = shards(data, way)
        model, naive = federated(parts)
        exact = copy.deepcopy(model)
        batchnorm.recalibrate(exact, data[0].split(64), tolerance=0)
        found = {"naive": naive, "merged": model, "recalibrated": exact}
        result["accuracy"][way] = {name: accuracy(each.eval(), [test]) for name, each in found.items()}
        result["sigma"][way] = exactness(exact, parts)
    return result


def shards(data: Digits, way: str) -> list[Digits]:
    """The digits of each client."""
    x, y = data
    order = torch.randperm(len(x))
    if way == "mixed":
        return [(x[part], y[part]) for part in order.chunk(CLIENTS)]
    client = torch.randperm(10).argsort() % CLIENTS  # of each class
    return [(x[client[y] == number], y[client[y] == number]) for number in range(CLIENTS)]


def federated(parts: list[Digits]) -> tuple[nn.Module, nn.Module]:
    """The common network after all rounds, and the same with the statistics of the last round averaged naively."""
    model = network()
    counts = [float(len(y)) for _, y in parts]
    naive = copy.deepcopy(model)
    for _ in range(ROUNDS):
        states = []
        for part in parts:
            client = copy.deepcopy(model).train()
            optimizer = torch.optim.SGD(client.parameters(), lr=LR, momentum=0.9)
            train(client, part, optimizer, STEPS, batch=32)
            states.append(client.state_dict())
        model.load_state_dict(batchnorm.merge_statistics(states, counts))
        naive.load_state_dict(averaged(states, counts))
    return model, naive


def averaged(states: Sequence[dict[str, Tensor]], counts: Sequence[float]) -> dict[str, Tensor]:
    """What is written without a library: every entry is averaged by count."""
    return {
        name: (
            sum(n * state[name].double() for n, state in zip(counts, states, strict=True)) / sum(counts)
        ).to(first.dtype)
        for name, first in states[0].items()
    }


def exactness(model: nn.Module, parts: list[Digits]) -> dict[str, float]:
    """One network: the statistics of what its layers see, by client and put together; the largest error of a σ."""
    states, counts = zip(*(seen(model, x) for x, _ in parts), strict=True)
    total = [float(len(y)) for _, y in parts]
    rules = {"naive": averaged(states, total), "merged": batchnorm.merge_statistics(states, counts)}
    true, _ = seen(model, torch.cat([x for x, _ in parts]))
    names = [name for name in true if name.endswith("running_var")]
    return {
        rule: max(
            float(((state[name] + EPS).sqrt() / (true[name] + EPS).sqrt() - 1).abs().max()) for name in names
        )
        for rule, state in rules.items()
    }


def seen(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Mean and unbiased variance of every batch norm's input in eval mode, and the number of values in them."""
    state: dict[str, Tensor] = {}
    counts: dict[str, float] = {}

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            values = args[0].double().transpose(0, 1).flatten(1)
            state[f"{name}.running_mean"], state[f"{name}.running_var"] = values.mean(1), values.var(1)
            counts[name] = float(values.shape[1])

        return hook

    handles = [
        module.register_forward_pre_hook(look(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return state, counts


def tables(runs: list[dict[str, Any]]) -> dict[str, str]:
    rows = []
    for name, title in NAMES.items():
        cells, against = [], []
        for way in SHARDS.values():
            values, naive = ([run["accuracy"][way][each] for run in runs] for each in (name, "naive"))
            cells.append(pages.percent(values))
            against.append("" if name == "naive" else pages.points(values, naive))
        rows.append([title, *cells, *against])
    head = ["statistics", *SHARDS, *(f"{way}: against the averages, points" for way in SHARDS)]
    sigma = [
        [NAMES[name], *(worst([run["sigma"][way][name] for run in runs]) for way in SHARDS.values())]
        for name in ("naive", "merged")
    ]
    return {
        "accuracy": pages.markdown(head, rows),
        "sigma": pages.markdown(["largest error of a σ", *SHARDS], sigma),
    }


def worst(values: list[float]) -> str:
    return f"{100 * max(values):.2g} %"


if __name__ == "__main__":
    main()
