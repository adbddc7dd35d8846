"""What a training step keeps for backward and how long it takes: a network as it is, fused, and fused to recompute.

    python benchmarks/fuse.py [--memory] [--networks] [--time] [--chains] [--again] [--docs]

Memory is counted (every storage that the autograd graph holds between forward and backward; parameters, buffers and
images left out) and, for ResNet-50, read: what the resident size of a process of its own has grown by. glibc is told to
give freed blocks back at once there. Time is that of whole steps, forward, backward and SGD, all variants in turn in
one process; --chains times ResNet-50 with longer and shorter chains of recomputed residuals, and --again counts what it
computes twice. Each part renews its share of benchmarks/results/fuse.json; --docs writes the tables of docs/fuse.md
anew from them. Needs torchvision and Linux.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
import unittest.mock
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm
from batchnorm import ops
from batchnorm._files import write_whole
from batchnorm.bench.machine import describe

SCHEMA_VERSION = 1
RESULTS = Path(__file__).parent / "results" / "fuse.json"
PAGE = Path(__file__).parent.parent / "docs" / "fuse.md"
SIZE, READ_BATCH, COUNTED_BATCH, TIMED_BATCH, ROUNDS = 224, 16, 4, 8, 8
VARIANTS = {"plain": "as it is", "keep": "`fuse(model)`", "recompute": '`fuse(model, memory="recompute")`'}
NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "densenet121", "vgg11_bn")
CHAINS = (1, 2, 3, 6)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
# From this size on glibc takes a block from the system, and gives it back when it is freed.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def main() -> None:
    """Measure what is asked for, keep the numbers, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for part in PARTS:
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--docs", action="store_true", help="write the tables of docs/fuse.md")
    parser.add_argument("--worker", nargs=2, metavar=("VARIANT", "CHAIN"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        variant, chain = arguments.worker
        print(json.dumps(memory_here(variant, int(chain))))
        return
    stored: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "kind": "fuse"}
    if RESULTS.exists():
        stored = json.loads(RESULTS.read_text(encoding="utf-8"))
    for part, measure in PARTS.items():
        if getattr(arguments, part):
            stored[part] = {"machine": describe("cpu"), **measure()}
            write_whole(RESULTS, json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
    if arguments.docs:
        write_whole(PAGE, filled(PAGE.read_text(encoding="utf-8"), stored))


def network(name: str) -> nn.Module:
    """torchvision's, which imports without its compiled operators once two of them are declared."""
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_library"] = library  # a library lives as long as its object
    from torchvision.models import get_model  # only now can it be imported

    made: nn.Module = get_model(name, weights=None)
    return made


def made(variant: str, chain: int = ops.CHAIN, name: str = "resnet50") -> nn.Module:
    """The network of that variant, the same weights in each."""
    torch.manual_seed(0)
    model = network(name).train()
    if variant == "plain":
        return model
    set_chain(chain)
    return batchnorm.fuse(model, memory=variant, inplace=True).model


def set_chain(chain: int) -> None:
    """How many layers in a row may compute their outputs again."""
    ops.CHAIN = ops.recompute.CHAIN = chain


def batch(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return images, torch.randint(1000, (count,), generator=generator)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def counted(output: Tensor, without: list[Tensor]) -> int:
    """The bytes that a graph keeps alive: each storage once, recipes by what they hold."""
    sizes: dict[int, int] = {}
    known = {each.untyped_storage().data_ptr() for each in without}

    def add(held: Any) -> None:
        if isinstance(held, Tensor):
            storage = held.untyped_storage()
            if storage.data_ptr() not in known:
                sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(held, tuple | list):
            for each in held:
                add(each)
        elif isinstance(held, torch._C._autograd.SavedTensor):
            add(held.data)
        elif type(held).__module__ == ops.recompute.__name__:
            add([*vars(held).values()])

    seen: set[Any] = set()
    nodes: list[Any] = [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        add([getattr(node, name) for name in dir(type(node)) if name.startswith("_raw_saved_")])
        add([*getattr(node, "__dict__", {}).values()])
        nodes += [each for each, _ in node.next_functions if each is not None]
    return sum(sizes.values())


def resident(key: str) -> int:
    """VmRSS (now) or VmHWM (the most since it was reset) of this process, in bytes."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit(f"error: got no {key} in /proc/self/status, expected Linux")
    return 1024 * int(found[1])


def memory_here(variant: str, chain: int) -> dict[str, float]:
    """ResNet-50 in this process: one step that does not count but for its loss, and one that is measured."""
    model = made(variant, chain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, labels = batch(READ_BATCH)
    first = step(model, optimizer, images, labels)
    optimizer.zero_grad(set_to_none=False)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    loss = F.cross_entropy(model(images), labels)
    read = resident("VmRSS") - before
    found = counted(loss, [*model.parameters(), *model.buffers(), images])
    loss.backward()
    return {"counted": found, "read": read, "peak": resident("VmHWM") - before, "first_loss": first}


def elsewhere(variant: str, chain: int) -> dict[str, float]:
    """`memory_here` in a process of its own."""
    command = [sys.executable, __file__, "--worker", variant, str(chain)]
    environment = {**os.environ, **MALLOC}
    ended = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(ended.stdout)
    return found


def memory() -> dict[str, Any]:
    """What every variant of ResNet-50 keeps, counted and read."""
    runs = {variant: (variant, ops.CHAIN) for variant in VARIANTS}
    runs |= {f"chain {chain}": ("recompute", chain) for chain in CHAINS}
    return {"batch": READ_BATCH, "runs": {name: elsewhere(*run) for name, run in runs.items()}}


def networks() -> dict[str, Any]:
    """The counted bytes of other networks, one forward each."""
    images, labels = batch(COUNTED_BATCH)
    found: dict[str, dict[str, int]] = {}
    for name in NETWORKS:
        found[name] = {}
        for variant in VARIANTS:
            model = made(variant, name=name)
            loss = F.cross_entropy(model(images), labels)
            found[name][variant] = counted(loss, [*model.parameters(), *model.buffers(), images])
    return {"batch": COUNTED_BATCH, "counted": found}


def timed(runs: dict[str, tuple[str, int, str]]) -> dict[str, Any]:
    """Seconds of a step, all in turn, every other round in the opposite order; the first round does not count.

    Each of `runs` is a variant, a chain and a layout.
    """
    images, labels = batch(TIMED_BATCH)
    models, optimizers, inputs = {}, {}, {}
    for name, (variant, chain, layout) in runs.items():
        models[name] = made(variant, chain).to(memory_format=LAYOUTS[layout])
        optimizers[name] = torch.optim.SGD(models[name].parameters(), lr=0.01, momentum=0.9)
        inputs[name] = images.to(memory_format=LAYOUTS[layout])
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(ROUNDS + 1):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            set_chain(runs[name][1])
            start = time.perf_counter()
            step(models[name], optimizers[name], inputs[name], labels)
            if number:
                found[name].append(time.perf_counter() - start)
    return {"batch": TIMED_BATCH, "seconds": found}


def steps() -> dict[str, Any]:
    return timed(
        {f"{variant}, {layout}": (variant, ops.CHAIN, layout) for layout in LAYOUTS for variant in VARIANTS}
    )


def chains() -> dict[str, Any]:
    return timed(
        {
            "keep": ("keep", ops.CHAIN, "contiguous"),
            **{f"chain {chain}": ("recompute", chain, "contiguous") for chain in CHAINS},
        }
    )


def again() -> dict[str, Any]:
    """The elements that one backward of ResNet-50 computes again, a residual's included, for one image of two."""
    images, _ = batch(2)
    call = ops.recompute._Again.__call__
    found = {}
    for chain in CHAINS:
        sizes: list[int] = []

        def counting(one: Any, sizes: list[int] = sizes) -> Tensor:
            output = call(one)
            sizes.append(output.numel() // len(images))
            return output

        with unittest.mock.patch.object(ops.recompute._Again, "__call__", counting):
            made("recompute", chain)(images).sum().backward()
        found[f"chain {chain}"] = sum(sizes)
    return {"elements": found}


PARTS = {"memory": memory, "networks": networks, "time": steps, "chains": chains, "again": again}


def filled(page: str, stored: dict[str, Any]) -> str:
    """The page with its tables made anew; what stands outside of the markers stays."""
    for name, table in (
        ("memory", memory_table(stored)),
        ("networks", networks_table(stored)),
        ("time", time_table(stored)),
        ("chains", chains_table(stored)),
    ):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        page, count = re.subn(
            pattern, lambda found, table=table: found[1] + table + found[2], page, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"error: got {count} places marked {name} in {PAGE}, expected 1")
    return page


def megabytes(value: float) -> str:
    return f"{value / 1e6:,.0f} MB"


def less(value: float, than: float) -> str:
    """In per cent of what there was."""
    change = 100 * (value / than - 1)
    return f"{change:+.1f} %".replace("-", "−")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def memory_table(stored: dict[str, Any]) -> str:
    runs = stored["memory"]["runs"]
    rows = []
    for variant, name in VARIANTS.items():
        cells = [name]
        for key in ("counted", "read", "peak"):
            share = "" if variant == "plain" else f" ({less(runs[variant][key], runs['plain'][key])})"
            cells.append(megabytes(runs[variant][key]) + share)
        rows.append(cells)
    return table(["ResNet-50", "kept, counted", "kept, resident size", "peak of the step"], rows)


def networks_table(stored: dict[str, Any]) -> str:
    rows = []
    for name, found in stored["networks"]["counted"].items():
        shares = [less(found[variant], found["plain"]) for variant in ("keep", "recompute")]
        rows.append([name, megabytes(found["plain"]), *shares])
    return table(["network", *VARIANTS.values()], rows)


def time_table(stored: dict[str, Any]) -> str:
    seconds = stored["time"]["seconds"]
    rows = []
    for variant, name in VARIANTS.items():
        cells = [name]
        for layout in LAYOUTS:
            found, plain = seconds[f"{variant}, {layout}"], seconds[f"plain, {layout}"]
            cells.append(f"{statistics.median(found):.2f} s ({min(found):.2f} to {max(found):.2f})")
            cells.append(f"{ratio(found, plain):.2f}")
        rows.append(cells)
    head = ["ResNet-50"]
    for layout in LAYOUTS:
        head += [layout, "ratio"]
    return table(head, rows)


def ratio(one: list[float], other: list[float]) -> float:
    """The median over rounds of the ratio of their times."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def chains_table(stored: dict[str, Any]) -> str:
    runs, seconds = stored["memory"]["runs"], stored["chains"]["seconds"]
    rows = []
    for chain in CHAINS:
        found = runs[f"chain {chain}"]
        rows.append(
            [
                str(chain),
                f"{megabytes(found['counted'])} ({less(found['counted'], runs['plain']['counted'])})",
                f"{stored['again']['elements'][f'chain {chain}'] / 1e6:.1f} million",
                less(ratio(seconds[f"chain {chain}"], seconds["keep"]), 1.0),
            ]
        )
    return table(["at most in a row", "kept", "elements again, an image", "time of a step"], rows)


if __name__ == "__main__":
    main()
