"""`python -m batchnorm.bench`: the benchmark where nothing but PyTorch is installed.

    PYTHONPATH=src python3 -m batchnorm.bench --device cuda --suite resnet50 --json results.json
    PYTHONPATH=src python3 -m batchnorm.bench --device cuda --what step --dtype bfloat16 --json steps.json

It prints the verdict, sums and mean ratios, and writes the numbers; `batchnorm bench` has tables, progress and a page.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from batchnorm._errors import BatchNormError
from batchnorm._files import check_writable
from batchnorm.bench import (
    Benchmark,
    HostTimes,
    Silent,
    Synchronization,
    TrainingSteps,
    measure,
    measure_distributed,
    measure_host,
    measure_steps,
)
from batchnorm.bench.machine_words import where
from batchnorm.bench.plan import AUTO, BACKENDS, DEFAULT_SUITES, LAYOUTS
from batchnorm.bench.wording import NAME

__all__ = ["main"]


class _Lines(Silent):
    """A line on stderr for each finished case."""

    def case_finished(self, label: str, effort: float, outcome: str) -> None:
        """Print what came of it."""
        print(f"{label}: {outcome}", file=sys.stderr, flush=True)


def main() -> None:
    """Measure what the arguments ask for."""
    arguments = _parse()
    try:
        if arguments.json:
            check_writable(arguments.json)
        measured, options = _measurement(arguments)
        result: Benchmark | HostTimes | Synchronization | TrainingSteps = measured(
            progress=_Lines(), **options
        )
        if arguments.json:
            result.save(arguments.json)
    except BatchNormError as error:
        sys.exit(f"error: {error}")
    print(result)
    if isinstance(result, Benchmark):
        print("\n".join([where(result.machine), *sums(result), *means(result)]))
    if result.failures or result.interrupted:
        sys.exit(130 if result.interrupted else 1)


def _measurement(arguments: argparse.Namespace) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What is to be called, and with what."""
    step = arguments.what == "step"
    layouts = arguments.layout or ("channels-last" if step else ",".join(LAYOUTS))
    common: dict[str, Any] = {
        "layouts": layouts.split(","),
        "dtypes": arguments.dtype.split(","),
        "device": arguments.device,
        "threads": arguments.threads,
        "rounds": arguments.rounds or (10 if step else 5),
        "backend": arguments.backend,
    }
    if arguments.what == "host":
        return measure_host, common
    common["batch"] = arguments.batch
    if step:
        return measure_steps, {**common, "network": arguments.network, "image": arguments.image}
    common["suites"] = arguments.suite.split(",")
    if arguments.distributed:
        return measure_distributed, {**common, "processes": arguments.processes}
    return measure, {**common, "against": arguments.against.split(",")}


def sums(result: Benchmark) -> list[str]:
    """What the batch norms of a network take together, a line each."""
    lines = []
    for total in result.totals:
        times = [
            f"{NAME.get(name, name)} {'–' if value is None else f'{1e3 * value:.3f} ms'}"
            for name, value in (*total.seconds.items(), ("copy", total.counted / result.copy))
        ]
        about = f"{total.suite} {total.layout} {total.dtype} {total.operation} {total.epilogue} malloc {total.memory}"
        lines.append(f"{about}: sum over {total.norms}: {', '.join(times)}")
    return lines


def means(result: Benchmark) -> list[str]:
    """The mean ratios, a line each."""
    return [
        f"{group.suite} {group.layout} {group.dtype} {group.operation} {group.epilogue} malloc {group.memory}: "
        f"{group.ratio:.2f}× {group.rival}, worst {group.worst:.2f}, share {group.share:.0%}"
        for group in result.groups
        if not group.larger_than
    ]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m batchnorm.bench", description="Time the layers against PyTorch's."
    )
    parser.add_argument("--suite", default=",".join(DEFAULT_SUITES), help="names with commas between, or all")
    parser.add_argument("--what", default="layers", choices=("layers", "host", "step"))
    parser.add_argument("--network", default="resnet50", help="of --what step")
    parser.add_argument("--image", type=int, default=224, help="of --what step: the images' side in pixels")
    parser.add_argument("--layout", help="by default both, and channels-last for --what step")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--against", default="eager", help="eager, compile, cudnn")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, help="by default 5, and 10 for --what step")
    parser.add_argument("--backend", default=AUTO, choices=(AUTO, *BACKENDS), help="what runs our layers")
    parser.add_argument("--distributed", action="store_true", help="synchronized layers in several processes")
    parser.add_argument("--processes", type=int, default=2, help="how many, with --distributed")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
