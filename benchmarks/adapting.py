"""Adapting to digits from another scanner while they come: by the size of the batch, and in a sorted stream.

    python benchmarks/adapting.py [--seeds N] [--again] [--docs] [--no-run]

The network of digit_runs.py is trained on MNIST's digits and reads scikit-learn's 1,797 in one go, batch after batch,
shuffled or one class after the other. No label is used.
"""

import warnings
from typing import Any

import pages
import torch
from digit_runs import Digits, accuracy, digits, mnist, trained

import batchnorm

PAGE = pages.DOCS / "adapting.md"
STEPS = 600
SIZES, PRIORS = (1, 4, 16, 64, 256), (0, 16, 64, 256, 1024)
METHODS = {"batch": '"batch"', "blend": '"blend", N = 16', "tent": '"tent"'}


def main() -> None:
    pages.main("adapting", __doc__.splitlines()[0], run, tables, PAGE, seeds=5)


def run(seed: int) -> dict[str, Any]:
    return one_seed(seed, mnist(), digits())


def one_seed(seed: int, source: Digits, target: Digits) -> dict[str, Any]:
    """Train once; read the target with every method, size and order."""
    model = trained(seed, source, STEPS)
    x, y = target
    mixed = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    by_class = mixed[y[mixed].argsort(stable=True)]

    def read(order: torch.Tensor, size: int, *options: Any, **more: Any) -> tuple[float, bool]:
        batches = list(zip(x[order].split(size), y[order].split(size), strict=True))
        if len(batches[-1][1]) < size:  # one image that is left over cannot be a batch
            batches.pop()
        with (
            warnings.catch_warnings(record=True) as told,
            batchnorm.adapt(model, *options, **more) as adapted,
        ):
            warnings.simplefilter("always")
            found = accuracy(adapted, batches)
        return found, any("sorted" in str(each.message) for each in told)

    sizes = {
        method: {str(size): read(mixed, size, method)[0] for size in SIZES if size > 1 or method == "blend"}
        for method in METHODS
    }
    streams: dict[str, dict[str, list[Any]]] = {"shuffled": {}, "sorted by class": {}}
    for name, order in zip(streams, (mixed, by_class), strict=True):
        streams[name] = {str(prior): list(read(order, 64, "blend", prior=prior)) for prior in PRIORS}
    return {"running": accuracy(model, [target]), "sizes": sizes, "streams": streams}


def tables(runs: list[dict[str, Any]]) -> dict[str, str]:
    before = pages.percent([run["running"] for run in runs])
    rows = [["not adapted", *[before] * len(SIZES)]]
    for method, title in METHODS.items():
        cells = [
            pages.percent([run["sizes"][method][str(size)] for run in runs])
            if str(size) in runs[0]["sizes"][method]
            else "refused"
            for size in SIZES
        ]
        rows.append([title, *cells])
    streams = []
    for name in runs[0]["streams"]:
        cells = [pages.percent([run["streams"][name][str(prior)][0] for run in runs]) for prior in PRIORS]
        warned = sum(run["streams"][name]["16"][1] for run in runs)
        streams.append([name, *cells, f"{warned} of {len(runs)}"])
    return {
        "sizes": pages.markdown(["batches of", *map(str, SIZES)], rows),
        "streams": pages.markdown(["stream", *(f"N = {prior}" for prior in PRIORS), "warned"], streams),
    }


if __name__ == "__main__":
    main()
