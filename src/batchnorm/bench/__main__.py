"""`python -m batchnorm.bench`: the benchmark where nothing but PyTorch is installed.

    PYTHONPATH=src python3 -m batchnorm.bench --device cuda --suite resnet50 --json results.json

It prints the verdict and writes the numbers; `batchnorm bench` has tables, progress and a page.
"""

import argparse
import sys
from typing import Any

from batchnorm._errors import BatchNormError
from batchnorm._files import check_writable
from batchnorm.bench import Benchmark, Silent, Synchronization, measure, measure_distributed
from batchnorm.bench.plan import BACKENDS, DEFAULT_SUITES, LAYOUTS

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
        common: dict[str, Any] = {
            "layouts": arguments.layout.split(","),
            "dtypes": arguments.dtype.split(","),
            "device": arguments.device,
            "batch": arguments.batch,
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "backend": arguments.backend,
            "progress": _Lines(),
        }
        result: Benchmark | Synchronization
        if arguments.distributed:
            result = measure_distributed(arguments.suite.split(","), processes=arguments.processes, **common)
        else:
            result = measure(arguments.suite.split(","), against=arguments.against.split(","), **common)
        if arguments.json:
            result.save(arguments.json)
    except BatchNormError as error:
        sys.exit(f"error: {error}")
    print(result)
    if isinstance(result, Benchmark):
        print(means(result))
    if result.failures or result.interrupted:
        sys.exit(130 if result.interrupted else 1)


def means(result: Benchmark) -> str:
    """The mean ratios, a line each."""
    return "\n".join(
        f"{group.suite} {group.layout} {group.dtype} {group.operation} {group.epilogue} malloc {group.memory}: "
        f"{group.ratio:.2f}× {group.rival}, worst {group.worst:.2f}, share {group.share:.0%}"
        for group in result.groups
        if not group.larger_than
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m batchnorm.bench", description="Time the layers against PyTorch's."
    )
    parser.add_argument("--suite", default=",".join(DEFAULT_SUITES), help="names with commas between, or all")
    parser.add_argument("--layout", default=",".join(LAYOUTS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--against", default="eager", help="eager, compile")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", choices=BACKENDS, help="what runs our layer; else the usual choice")
    parser.add_argument("--distributed", action="store_true", help="synchronized layers in several processes")
    parser.add_argument("--processes", type=int, default=2, help="how many, with --distributed")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
