"""How much faster a folded ResNet-50 is: inference on the CPU, against the same network unfolded.

    python benchmarks/fold_speed.py [--only CASE ...] [--rounds N] [--docs] [--no-run]

torchvision's network with random weights (pip install --no-deps -r tests/no-deps.txt), images of 224x224 in float32.
The four networks take turns in one process; a case is kept in benchmarks/results/fold_speed.json as it finishes. --docs
writes the table of docs/changing.md.
"""

import argparse
import copy
import json
import sys
from dataclasses import asdict
from itertools import product
from typing import Any

import torch
from pages import DOCS, RESULTS, ROOT, SCHEMA_VERSION, filled, markdown
from torch import nn

import batchnorm
from batchnorm._files import write_whole
from batchnorm.bench.machine import describe
from batchnorm.bench.statistics import median, percentile
from batchnorm.bench.timing import clock_for, interleaved

FILE, PAGE = RESULTS / "fold_speed.json", DOCS / "changing.md"
BATCHES, LAYOUTS = (1, 16), ("contiguous", "channels-last")
CASES = {f"{layout}-{batch}": (layout, batch) for layout, batch in product(LAYOUTS, BATCHES)}
NAMES = {
    "torch": "`torch.nn`",
    "convert": '`convert(model, "batchnorm")`',
    "fuse": "`fuse(model)`",
    "fold": "`fold(model)`",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=CASES, help=f"of {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each network (default: 12)")
    parser.add_argument("--docs", action="store_true", help="write the table of docs/changing.md")
    parser.add_argument("--no-run", dest="run", action="store_false", help="only what --docs says")
    arguments = parser.parse_args()
    if arguments.run:
        found = networks(resnet50())
        for name in arguments.only or CASES:
            keep(name, measured(found, *CASES[name], rounds=arguments.rounds))
    if arguments.docs:
        write_whole(PAGE, filled(PAGE.read_text(encoding="utf-8"), tables(), PAGE))


def resnet50() -> nn.Module:
    """torchvision's, whose batch norms have the statistics of a batch of noise, so that nothing grows or dies."""
    sys.path.append(str(ROOT / "tests"))
    from model_packages import package

    torch.manual_seed(0)
    model = package("torchvision.models").resnet50()
    batchnorm.recalibrate(model, [torch.randn(8, 3, 224, 224)], tolerance=0)
    return model.eval()


def networks(model: nn.Module) -> dict[str, nn.Module]:
    """The network as it is and after each operation; `fold` checks that its outputs are those of before."""
    folded = batchnorm.fold(model, torch.randn(1, 3, 64, 64))
    if any(isinstance(module, nn.BatchNorm2d) for module in folded.model.modules()):
        raise SystemExit(f"error: got batch norms that are not folded, expected none\n{folded}")
    return {
        "torch": model,
        "convert": batchnorm.convert(model, "batchnorm").model,
        "fuse": batchnorm.fuse(model).model,
        "fold": folded.model,
    }


def measured(found: dict[str, nn.Module], layout: str, batch: int, *, rounds: int) -> dict[str, Any]:
    """Seconds a call of each network, in turn."""
    form = torch.channels_last if layout == "channels-last" else torch.contiguous_format
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=form)
    placed = {name: copy.deepcopy(model).to(memory_format=form) for name, model in found.items()}
    with torch.inference_mode():
        times = interleaved(
            {name: lambda model=model: model(x) for name, model in placed.items()}, clock_for("cpu"), rounds
        )
    return {
        "machine": describe("cpu"),
        "layout": layout,
        "batch": batch,
        "times": {name: asdict(timing) for name, timing in times.items()},
    }


def keep(name: str, case: dict[str, Any]) -> None:
    """Put one case into the file; the others stay."""
    cases = stored() if FILE.exists() else {}
    cases[name] = case
    content = {"schema_version": SCHEMA_VERSION, "kind": "fold_speed", "cases": cases}
    write_whole(FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def stored() -> dict[str, Any]:
    cases: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))["cases"]
    return cases


def tables() -> dict[str, str]:
    """Milliseconds, and how often the folded network runs in the time of each other one, round by round."""
    cases = [(name, stored()[name]) for name in CASES if name in stored()]
    head = ["milliseconds, median (20 % to 80 %)", *(title(case) for _, case in cases)]
    rows = [[NAMES[arm], *(spread(case["times"][arm]) for _, case in cases)] for arm in NAMES]
    for arm in ("torch", "fuse"):
        cells = [ratio(case["times"][arm]["rounds"], case["times"]["fold"]["rounds"]) for _, case in cases]
        rows.append([f"folded against {NAMES[arm]}", *cells])
    return {"fold": markdown(head, rows)}


def title(case: dict[str, Any]) -> str:
    return f"{case['layout']}, batch {case['batch']}"


def spread(times: dict[str, Any]) -> str:
    p20, p50, p80 = (1e3 * times[key] for key in ("p20", "p50", "p80"))
    digits = 0 if p50 >= 100 else 1
    return f"{p50:.{digits}f} ({p20:.{digits}f} to {p80:.{digits}f})"


def ratio(others: list[float], folded: list[float]) -> str:
    """The median over the rounds, and where 20 % and 80 % of them lie."""
    values = [other / fold for other, fold in zip(others, folded, strict=True)]
    return f"{median(values):.2f}× ({percentile(values, 0.2):.2f} to {percentile(values, 0.8):.2f})"


if __name__ == "__main__":
    main()
