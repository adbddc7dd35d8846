"""Results without measurements, and workers without processes."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from bench_helpers import MACHINE, make_record

from batchnorm.bench import Benchmark, _worker, process
from batchnorm.bench.plan import Settings


@pytest.fixture
def result() -> Benchmark:
    """Two shapes in both layouts and states of the memory; one larger than 32 MB."""
    records = [
        make_record(
            0.002 if shape[2] < 100 else 0.04,
            (0.004 if shape[2] < 100 else 0.03) * (1.5 if memory == "as-is" else 1),
            shape=shape,
            count=count,
            epilogue=epilogue,
            layout=layout,
            memory=memory,
        )
        for layout in ("contiguous", "channels-last")
        for shape, count, epilogue in (
            ((16, 64, 112, 112), 1, "relu"),
            ((16, 64, 56, 56), 6, "relu"),
            ((16, 256, 14, 14), 5, "residual+relu"),
        )
        for memory in ("as-is", "raised")
    ]
    return Benchmark(Settings(suites=("resnet50",)), MACHINE, 30e9, 31e9, tuple(records), len(records))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """Workers without processes of their own; the list of the jobs that they are given."""
    jobs: list[Mapping[str, Any]] = []

    def work(job: Mapping[str, Any], memory: str = "as-is") -> Iterator[dict[str, Any]]:
        jobs.append(job)
        if job["task"] == "machine":
            yield {"machine": dict(MACHINE), "copy": 30e9}
        else:
            yield from _worker.answers(dict(job))

    monkeypatch.setattr(process, "work", work)
    return jobs
