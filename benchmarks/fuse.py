"""ResNet-50 as it is, fused, and fused with memory="recompute": what a training step keeps for backward and how long it takes.

    python benchmarks/fuse.py [--memory] [--time] [--docs]

Memory is counted (every storage that the autograd graph holds between forward and backward, parameters, buffers and the
images left out) and read (what the resident size of a process of its own has grown by; glibc is told to give every freed
block back at once). Time is that of whole steps, forward, backward and SGD, of all variants in turn in one process. The
results go to benchmarks/results/fuse.json; --docs writes the tables of docs/fuse.md anew from them. Needs torchvision.
"""

import argparse
import copy
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm
from batchnorm import ops
from batchnorm._files import write_whole

SCHEMA_VERSION = 1
RESULTS = Path(__file__).parent / "results" / "fuse.json"
PAGE = Path(__file__).parent.parent / "docs" / "fuse.md"
SIZE, BATCH, ROUNDS = 224, 16, 5
VARIANTS = ("plain", "fused", "recompute")
CHAINS = (1, 2, 3, 6)
# From this size on glibc takes a block from the system and gives it back when it is freed.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resnet50() -> nn.Module:
    """torchvision's, which imports without its compiled operators once two of them are declared."""
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for name in ("nms", "qnms"):
            library.define(f"{name}{arguments}")
        globals()["_library"] = library  # a library lives as long as its object
    from torchvision.models import resnet50 as make  # only now can it be imported

    return make(weights=None)


def made(variant: str) -> nn.Module:
    """The network of that name, the same weights in each."""
    torch.manual_seed(0)
    model = resnet50().train()
    if variant == "plain":
        return model
    memory = "keep" if variant == "fused" else "recompute"
    return batchnorm.fuse(model, memory=memory, inplace=True).model


def batch(count: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, size, size, generator=generator)
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
            add([value for value in vars(held).values()])

    seen: set[Any] = set()
    nodes: list[Any] = [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        add([getattr(node, name) for name in dir(type(node)) if name.startswith("_raw_saved_")])
        add([value for value in getattr(node, "__dict__", {}).values()])
        nodes += [each for each, _ in node.next_functions if each is not None]
    return sum(sizes.values())


def resident(key: str) -> int:
    """VmRSS (now) or VmHWM (the most since it was reset) of this process, in bytes."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit(f"error: got no {key} in /proc/self/status, expected Linux")
    return 1024 * int(found[1])


def memory_here(variant: str, count: int, size: int) -> dict[str, float]:
    """One step of one variant in this process, after one that does not count."""
    model = made(variant)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, labels = batch(count, size)
    step(model, optimizer, images, labels)
    optimizer.zero_grad(set_to_none=False)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    loss = F.cross_entropy(model(images), labels)
    kept = resident("VmRSS") - before
    outside = [*model.parameters(), *model.buffers(), images]
    found = {"counted": counted(loss, outside), "kept": kept, "loss": loss.item()}
    loss.backward()
    return {**found, "peak": resident("VmHWM") - before}


def memory(variant: str, chain: int, count: int, size: int) -> dict[str, float]:
    """`memory_here` in a process of its own."""
    command = [sys.executable, __file__, "--worker", variant, "--chain", str(chain)]
    command += ["--batch", str(count), "--size", str(size)]
    ended = subprocess.run(command, env={**os.environ, **MALLOC}, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(ended.stdout)
    return found


def times(count: int, size: int, rounds: int, variants: dict[str, tuple[str, int]]) -> dict[str, list[float]]:
    """Seconds of a step, all variants in turn, every other round in the opposite order; the first does not count."""
    images, labels = batch(count, size)
    models = {name: made(variant) for name, (variant, _) in variants.items()}
    optimizers = {
        name: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for name, model in models.items()
    }
    found: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        order = list(variants)
        for name in order[:: -1 if number % 2 else 1]:
            ops.recompute.CHAIN = variants[name][1]
            start = time.perf_counter()
            step(models[name], optimizers[name], images, labels)
            if number:
                found[name].append(time.perf_counter() - start)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker")
    parser.add_argument("--chain", type=int, default=2)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--memory", action="store_true")
    a = parser.parse_args()
    if a.worker:
        ops.recompute.CHAIN = a.chain
        print(json.dumps(memory_here(a.worker, a.batch, a.size)))
    if a.memory:
        plain = memory("plain", 2, a.batch, a.size)
        for v, c in [("fused", 2)] + [("recompute", c) for c in CHAINS]:
            m = memory(v, c, a.batch, a.size)
            print(v, c, {k: (round(m[k] / 2**20), round(m[k] / plain[k], 3)) for k in m}, flush=True)
        print("plain", plain)
    if a.time:
        vs = {"plain": ("plain", 2), "fused": ("fused", 2), **{f"re{c}": ("recompute", c) for c in CHAINS}}
        t = times(a.batch, a.size, ROUNDS, vs)
        for k in t:
            print(k, [round(x, 2) for x in t[k]], round(statistics.median(t[k]), 3))
