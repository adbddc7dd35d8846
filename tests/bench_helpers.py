"""What the tests of the benchmark share: a case, and records made of numbers alone."""

from typing import Any

from batchnorm.bench.case import OPERATIONS, Case
from batchnorm.bench.record import Record, Timing

MACHINE = {
    "batchnorm": "0.1.0",
    "commit": "abc123",
    "torch": "2.13.0",
    "python": "3.11.7",
    "system": "Linux",
    "libc": "glibc 2.36",
    "cpu": "A CPU",
    "device": "A CPU",
    "cores": 2,
    "threads": 2,
    "huge_pages": "madvise",
    "load": 0.0,
    "kernels": "installed",
}


def make_case(**changes: Any) -> Case:
    fields: dict[str, Any] = {
        "suite": "resnet50",
        "shape": (16, 64, 56, 56),
        "count": 6,
        "epilogue": "relu",
        "layout": "contiguous",
        "dtype": "float32",
        "device": "cpu",
        "threads": None,
        "memory": "as-is",
    }
    return Case(**{**fields, **changes})


def timing(seconds: float, faults: float | None = 0.0) -> Timing:
    return Timing(0.9 * seconds, seconds, 1.2 * seconds, (seconds, 1.1 * seconds, 0.9 * seconds), faults)


def make_record(ours: float, theirs: float, **changes: Any) -> Record:
    times = {name: {"batchnorm": timing(ours), "eager": timing(theirs)} for name in OPERATIONS}
    found = {"y": 1e-7, "dx": 2e-7, "dweight": 0.0, "dbias": 0.0, "y of inference": 1e-7}
    return Record(
        make_case(**changes),
        backends={"training": "cpu", "inference": "cpu"},
        errors={"batchnorm": found, "eager": {**found, "dx": 8.6e-6}},
        times=times,
    )
