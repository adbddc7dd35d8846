"""Time the layers against torch.nn's: forward and backward, with and without ReLU.

    python benchmarks/layers.py [--device cpu] [--threads N] [--repeats N] [--json FILE]

Both layers of a line are timed in turn, in one run, so that whatever else the machine does meets both.
A time is printed only for a layer whose output and gradients agree with torch's. `share` is the speed
with which five tensors (read x, write y, read dy and x, write dx: the least there is) would have been
moved, as a share of the speed at which this machine copies tensors of 64 MB; it exceeds 100 % where a
tensor stays in a cache.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import batchnorm

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Case:
    """One line of the table: a shape, its layout, and the activation behind the layer."""

    shape: tuple[int, ...]
    channels_last: bool
    activation: str | None

    def __str__(self) -> str:
        layout = " nhwc" if self.channels_last else ""
        return "×".join(map(str, self.shape)) + layout + (f" {self.activation}" if self.activation else "")


@dataclass(frozen=True)
class Times:
    """Seconds at the 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Result:
    """What was measured for a case; `ratio` is torch's median over ours, above 1 where ours is faster."""

    case: str
    backend: str
    ours: Times
    torch: Times
    ratio: float
    gigabytes_per_second: float
    share_of_copy: float


CASES = [
    Case(shape, channels_last, activation)
    for shape, channels_last in [
        ((64, 100), False),
        ((4096, 256), False),
        ((32, 16, 8, 8), False),
        ((16, 64, 56, 56), False),
        ((16, 64, 56, 56), True),
        ((32, 256, 14, 14), False),
        ((32, 256, 14, 14), True),
    ]
    for activation in (None, "relu")
]


def main() -> None:
    """Run the cases, print the table and write the JSON."""
    arguments = parse()
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    copy = copy_speed(device)
    header = machine(device) | {"copy_gigabytes_per_second": round(copy / 1e9, 2)}
    quiet = arguments.json == "-"
    if not quiet:
        for name, value in header.items():
            print(f"{name}: {value}")
        print("\nforward + backward, µs: 50th percentile (20th–80th)")
        print(
            f"{'case':<26} {'backend':<10} {'batchnorm':>24} {'torch':>24} {'ratio':>6} {'GB/s':>6} {'share':>6}"
        )
    results = []
    for case in CASES:
        result = measure(case, device, arguments.repeats, copy)
        results.append(result)
        if not quiet:
            print(line(result), flush=True)
    if arguments.json:
        report = {
            "schema_version": SCHEMA_VERSION,
            "kind": "layer-benchmark",
            "machine": header,
            "results": [asdict(result) for result in results],
        }
        save(json.dumps(report, indent=2) + "\n", arguments.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the layers of batchnorm against those of torch.nn.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads of torch on CPU"
    )
    parser.add_argument("--repeats", type=int, default=40, help="timed runs of each layer (default: 40)")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON; - is standard output")
    arguments = parser.parse_args()
    if arguments.repeats < 5 or arguments.threads < 1:
        parser.error(
            f"got --repeats {arguments.repeats} --threads {arguments.threads}, expected at least 5 and 1"
        )
    if arguments.device not in ("cpu", "cuda") or (
        arguments.device == "cuda" and not torch.cuda.is_available()
    ):
        parser.error(
            f"got --device {arguments.device}, expected cpu, or cuda where torch finds such a device"
        )
    if arguments.json not in (None, "-") and not Path(arguments.json).resolve().parent.is_dir():
        parser.error(f"got --json {arguments.json}, expected a file in a folder that exists")
    return arguments


def machine(device: torch.device) -> dict[str, str | int]:
    """What the numbers depend on."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            row.split(":", 1)[1].strip() for row in cpuinfo.read_text().splitlines() if "model name" in row
        ]
        name = models[0] if models else name
    return {
        "batchnorm": batchnorm.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else name,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
    }


def measure(case: Case, device: torch.device, repeats: int, copy: float) -> Result:
    x = torch.randn(case.shape, device=device)
    dy = torch.randn(case.shape, device=device)
    if case.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
        dy = dy.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    ours, theirs = layers(case, device)
    agree(case, gradients(ours, x, dy), gradients(theirs, x, dy))
    mine, other = interleaved(
        lambda: gradients(ours, x, dy), lambda: gradients(theirs, x, dy), device, repeats
    )
    speed = 5 * x.numel() * x.element_size() / mine.p50
    choice = batchnorm.explain_backend(x, training=True, activation=case.activation)
    return Result(str(case), choice.chosen, mine, other, other.p50 / mine.p50, speed / 1e9, speed / copy)


def layers(case: Case, device: torch.device) -> tuple[nn.Module, nn.Module]:
    channels = case.shape[1]
    two_dimensional = len(case.shape) == 4
    ours = (batchnorm.BatchNorm2d if two_dimensional else batchnorm.BatchNorm1d)(
        channels, activation=case.activation, device=device
    )
    plain = (nn.BatchNorm2d if two_dimensional else nn.BatchNorm1d)(channels, device=device)
    return ours, nn.Sequential(plain, nn.ReLU()) if case.activation else plain


def gradients(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    y = layer(x)
    return (y, *torch.autograd.grad(y, [x, *layer.parameters()], dy))


def agree(case: Case, ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for name, mine, other in zip(("y", "dx", "dweight", "dbias"), ours, theirs, strict=True):
        error = (mine - other).abs().max().item() / other.abs().max().item()
        # 1e-3 for the sums of torch, which adds in float32; a wrong formula is off by far more.
        if not error < 1e-3:
            sys.exit(
                f"{case}: {name} is off by {error:.1e} of its largest value from torch's; nothing is timed"
            )


def interleaved(
    first: Callable[[], object], second: Callable[[], object], device: torch.device, repeats: int
) -> tuple[Times, Times]:
    """Time two functions in turn; each sample is as many calls as take about a millisecond."""
    calls = max(1, math.ceil(1e-3 / min(sample(first, device, 3), sample(second, device, 3))))
    samples = [(sample(first, device, calls), sample(second, device, calls)) for _ in range(repeats)]
    mine, other = zip(*samples, strict=True)
    return percentiles(mine), percentiles(other)


def sample(function: Callable[[], object], device: torch.device, calls: int) -> float:
    """Seconds per call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def percentiles(samples: tuple[float, ...]) -> Times:
    levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return Times(*torch.tensor(samples, dtype=torch.float64).quantile(levels).tolist())


def copy_speed(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy between two tensors of 64 MB."""
    source = torch.randn(16_000_000, device=device)
    target = torch.empty_like(source)
    times = [sample(lambda: target.copy_(source), device, 1) for _ in range(12)]
    return 2 * source.numel() * source.element_size() / percentiles(tuple(times)).p50


def line(result: Result) -> str:
    def text(times: Times) -> str:
        return f"{times.p50 * 1e6:.0f} ({times.p20 * 1e6:.0f}–{times.p80 * 1e6:.0f})"

    return (
        f"{result.case:<26} {result.backend:<10} {text(result.ours):>24} {text(result.torch):>24} "
        f"{result.ratio:>6.2f} {result.gigabytes_per_second:>6.1f} {result.share_of_copy:>6.0%}"
    )


def save(text: str, path: str) -> None:
    """Print the text, or write the file whole: in the folder of its place, then renamed."""
    if path == "-":
        print(text, end="")
        return
    target = Path(path).resolve()
    with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    try:
        Path(file.name).chmod(0o644)
        Path(file.name).replace(target)
    except OSError as error:
        Path(file.name).unlink()
        sys.exit(f"cannot write {target}: {error.strerror}")


if __name__ == "__main__":
    main()
