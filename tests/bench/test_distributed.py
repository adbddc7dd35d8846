"""The benchmark of synchronized layers: real processes once, the report from numbers alone."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bench_helpers import MACHINE, make_case, timing
from rich.console import Console

import batchnorm
from batchnorm.bench import Synchronization, _rank, measure_distributed, process
from batchnorm.bench.distributed import _few
from batchnorm.bench.plan import Settings, cases
from batchnorm.bench.record import Record
from batchnorm.bench.synchronization import Exchange
from batchnorm.report import terminal


def exchange(ours: float, plain: float, torchs: float | None = None, **changes: Any) -> Exchange:
    times = {"batchnorm": timing(ours), "plain": timing(plain)}
    if torchs is not None:
        times["torch-sync"] = timing(torchs)
    errors = {name: {"y": 1e-7, "dx": 2e-7} for name in times if name != "plain"}
    record = Record(
        make_case(**changes), backends={"training": "cpu"}, errors=errors, times={"forward+backward": times}
    )
    return Exchange(record, {name: {"collectives": 2, "bytes": 2064} for name in errors})


def result(*exchanges: Exchange, **changes: Any) -> Synchronization:
    fields: dict[str, Any] = {
        "settings": Settings(suites=("resnet50",)),
        "processes": 2,
        "machine": MACHINE,
        "exchanges": exchanges,
        "planned": len(exchanges),
    }
    return Synchronization(**{**fields, **changes})


def text(found: Synchronization) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(terminal.render(found.document()))
    return console.export_text()


def test_processes_measure_together() -> None:
    found = measure_distributed(["tiny"], processes=2, rounds=1)
    assert [each.record.case.shape for each in found.exchanges] == [(32, 64), (4, 8)]
    assert [each.record.case.count for each in found.exchanges] == [2, 2]
    for each, channels in zip(found.exchanges, (64, 8), strict=True):
        assert not each.record.failure
        assert set(each.times) == {"batchnorm", "plain"}
        assert 0 < each.times["batchnorm"].p20 <= each.times["batchnorm"].p50 <= each.times["batchnorm"].p80
        # mean, m2 and two counts forward, two sums backward, eight bytes each.
        assert each.exchanged == {
            "batchnorm": {"collectives": 2, "bytes": 8 * (2 * channels + 2 + 2 * channels)}
        }
        assert set(each.record.errors["batchnorm"]) == {"y", "dx", "dweight", "dbias", "y of inference"}
        assert max(each.record.errors["batchnorm"].values()) < 1e-6
    assert found.machine["torch"] == torch.__version__
    content = json.loads(found.to_json())
    assert (content["kind"], content["processes"], content["settings"]["batch"]) == ("synchronization", 2, 2)
    assert "against" not in content["settings"]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A single process, in this one: every exchange is with itself."""

    def work(jobs: Sequence[Mapping[str, Any]], memory: str = "as-is") -> Iterator[dict[str, Any]]:
        yield from _rank.rank_answers({**jobs[0], "processes": 1})

    threads = torch.get_num_threads()
    monkeypatch.setattr(process, "work_together", work)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("alone")
def test_a_wrong_layer_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        layer = whole(*arguments)
        layer.eps = 0.1
        return layer

    whole = _rank.synchronized
    monkeypatch.setattr(_rank, "synchronized", broken)
    found = measure_distributed(["tiny"], rounds=1)
    assert len(found.failures) == 2
    assert not any(each.times for each in found.exchanges)
    assert found.verdict.startswith("2 of 2 cases failed; the first: 32×64 none")
    assert "y is off by" in text(found)


@pytest.mark.usefixtures("alone")
def test_half_types_residuals_and_layouts() -> None:
    """The check of a part of the batch, with everything that a case may have."""
    found = measure_distributed(["resnet50"], layouts="all", dtypes=["bfloat16"], rounds=1, batch=2)
    epilogues = {each.record.case.epilogue for each in found.exchanges}
    assert {"relu", "residual+relu"} <= epilogues
    assert {each.record.case.layout for each in found.exchanges} == {"contiguous", "channels-last"}
    assert not found.failures
    assert all(
        "dresidual" in each.record.errors["batchnorm"]
        for each in found.exchanges
        if "residual" in each.record.case.epilogue
    )


def test_a_few_shapes_stand_for_a_network() -> None:
    every = cases(Settings(suites=("resnet50",), layouts=("contiguous",), memory=("as-is",), batch=2))
    few = list(_few(every))
    sizes = [case.elements for case in few]
    assert len(few) == 6
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (
        max(case.elements for case in every),
        min(case.elements for case in every),
    )
    for case in few:
        assert case.count == sum(each.count for each in every if each.shape == case.shape)


def test_what_is_missing_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(jobs: Sequence[Mapping[str, Any]], memory: str = "as-is") -> Iterator[dict[str, Any]]:
        yield from _rank.rank_answers(jobs[0])

    monkeypatch.setattr(process, "work_together", work)
    with monkeypatch.context() as without:
        without.setattr(dist, "is_available", lambda: False)
        with pytest.raises(
            batchnorm.InputError, match=r"got this PyTorch was built without torch\.distributed"
        ):
            measure_distributed(["tiny"])
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(batchnorm.InputError, match="got 2 processes need as many GPUs, and there are 1"):
        measure_distributed(["tiny"], device="cuda")
    for options, part in (
        ({"processes": 1}, "processes: got 1"),
        ({"device": "cuda:1"}, "each process has its own GPU"),
        ({"layouts": ["rows"]}, "layout: got 'rows'"),
    ):
        with pytest.raises(batchnorm.InputError, match=part):
            measure_distributed(["tiny"], **options)


def test_a_process_that_dies_takes_all_along(tmp_path: Path) -> None:
    jobs: list[dict[str, Any]] = [
        {
            "task": "rank",
            "rank": rank,
            "processes": 2,
            "meeting": str(tmp_path / "meeting"),
            "device": "cpu",
            "threads": 1,
            "rounds": 1,
            "cases": [vars(make_case(suite="tiny", shape=(4, 8), dtype=dtype))],
        }
        for rank, dtype in enumerate(("float32", "float31"))
    ]
    with pytest.raises(process.WorkerError, match=r"the process ended with 1: .*float31"):
        list(process.work_together(jobs))


def test_the_report_says_what_synchronizing_costs(tmp_path: Path) -> None:
    found = result(
        exchange(0.002, 0.0005), exchange(0.0031, 0.0006, shape=(2, 8, 7, 7), epilogue="residual+relu")
    )
    assert found.verdict == (
        "ResNet-50, contiguous, float32: synchronizing 2 processes costs a layer 2.00 ms a training step."
    )
    shown = text(found)
    assert "torch.nn.SyncBatchNorm runs on GPUs alone" in shown
    for part in ("2.1 kB in 2", "0.25", "2.0e-7", "add + ReLU", "2 processes on A CPU"):
        assert part in shown
    content = json.loads(found.to_json())
    assert content["results"][0]["synchronizing_seconds"] == pytest.approx(0.0015)
    assert content["results"][0]["ratio"] == {"plain": pytest.approx(0.25)}
    found.save(tmp_path / "sync.html")
    assert "Synchronized batch norm on this machine" in (tmp_path / "sync.html").read_text()


def test_the_report_of_a_gpu_and_of_an_interruption() -> None:
    settings = Settings(suites=("resnet50",), device="cuda")
    found = result(exchange(0.002, 0.0005, 0.003), settings=settings, planned=3, interrupted=True)
    assert found.verdict.endswith("and torch.nn.SyncBatchNorm takes 1.50 times as long as ours.")
    assert "runs on GPUs alone" not in text(found)
    assert "Interrupted: 1 of 3 cases are finished." in str(found)
    assert result().verdict == "Nothing was timed."
