"""A case from the inside: who is timed, what is checked, and the protocol of a worker's process."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_helpers import make_case

from batchnorm.bench import _worker, contenders, measure, process
from batchnorm.bench.accuracy import complaint, errors, exact
from batchnorm.bench.case import OPERATIONS
from batchnorm.bench.contenders import eager, inputs, our_layer
from batchnorm.bench.process import WorkerError, work
from batchnorm.bench.record import Record
from batchnorm.bench.suites import EPILOGUES
from batchnorm.bench.timing import CpuClock, interleaved

SMALL: dict[str, Any] = {"shape": (4, 6, 5, 5)}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("shape", [(8, 6), (4, 6, 5, 5), (2, 6, 3, 3, 3)], ids=str)
def test_both_layers_are_near_float64(shape: tuple[int, ...], epilogue: str, dtype: str) -> None:
    layout = "channels-last" if len(shape) > 2 else "rows"
    case = make_case(shape=shape, epilogue=epilogue, dtype=dtype, layout=layout)
    given = inputs(case)
    truth = exact(case, given)
    for layer in (our_layer(case, given), eager(case, given)):
        found = errors(layer, layer, truth)
        assert set(found) >= {"y", "dx", "dweight", "dbias", "y of inference"}
        assert ("dresidual" in found) == EPILOGUES[epilogue].residual
        assert complaint(found, given.x.dtype, "aten") == ""


def test_a_layout_is_what_it_says() -> None:
    given = inputs(make_case(**SMALL, layout="channels-last", epilogue="residual+relu"))
    assert given.residual is not None
    for x in (given.x, given.dy, given.residual):
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert not x.is_contiguous()


def test_a_case_is_measured(recwarn: pytest.WarningsRecorder) -> None:
    case = make_case(**SMALL)
    record = Record.read(case, json.loads(json.dumps(_worker.measure_case(case, ["eager"], 2))))
    assert record.failure == ""
    assert set(record.times) == set(OPERATIONS)
    for times in record.times.values():
        for timing in times.values():
            assert 0 < timing.p20 <= timing.p50 <= timing.p80
            assert len(timing.rounds) == 2
    assert record.backends["training"]
    assert not recwarn.list


@pytest.mark.parametrize("wrong", ["weight", "eps", "nan"])
def test_a_broken_layer_gets_no_time(
    monkeypatch: pytest.MonkeyPatch, here: list[Mapping[str, Any]], wrong: str
) -> None:
    def broken(*arguments: Any) -> torch.nn.Module:
        layer: Any = our_layer(*arguments)
        if wrong == "eps":
            layer.eps = 0.1
        else:
            with torch.no_grad():
                layer.weight[0] = float("nan") if wrong == "nan" else 3.0
        return layer  # type: ignore[no-any-return]

    monkeypatch.setattr(_worker, "our_layer", broken)
    found = measure("tiny", memory=["as-is"], rounds=1)
    assert len(found.failures) == len(found.records) == 4
    assert all("is off by" in record.failure and not record.times for record in found.records)
    assert "4 of 4 cases failed" in found.verdict
    assert found.groups == ()
    tables = [block for section in found.document().sections for block in section.blocks]
    assert any(getattr(block, "caption", "") == "Failed" for block in tables)


def test_our_own_kernels_must_be_nearer_than_pytorchs() -> None:
    found = {"y": 1e-5, "dx": 0.0}
    assert complaint(found, torch.float32, "aten") == ""
    assert complaint(found, torch.float32, "cpu").startswith("y is off by 1.0e-05 of its largest value")


def test_a_rival_that_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders.shutil, "which", lambda name: None)
    answer = _worker.measure_case(make_case(**SMALL), ["eager", "compile"], 1)
    assert answer["skipped"] == {
        "compile": "torch.compile needs a C++ compiler on the CPU, and none is installed"
    }
    assert set(answer["times"]["forward"]) == {"batchnorm", "eager"}


class SlowClock(CpuClock):
    """Says that every call takes so long that one is a sample and two are a round."""

    def sample(self, function: Callable[[], object], calls: int) -> float:
        function()
        return 0.02


def test_everyone_is_timed_in_turn() -> None:
    calls: list[str] = []
    functions = {name: functools.partial(calls.append, name) for name in ("a", "b")}
    times = interleaved(functions, SlowClock(), rounds=3)
    # Twice for the pace; then one call to warm up and two that count, forwards and backwards in turn.
    assert "".join(calls) == "aabb" + "aaabbb" + "bbbaaa" + "aaabbb"
    assert times["b"].rounds == (0.02, 0.02, 0.02)


def test_a_process_answers_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "statistics.py").write_text("raise SystemExit('not the one that was meant')")
    monkeypatch.chdir(tmp_path)
    cases = [vars(make_case(**SMALL, suite="tiny", threads=1)), vars(make_case(shape=(8, 3), layout="rows"))]
    job = {"task": "cases", "device": "cpu", "threads": 1, "against": ["eager"], "rounds": 1, "cases": cases}
    first, second = work(job, "raised")
    assert set(first) == set(second) == {"failure", "backends", "skipped", "errors", "times"}
    assert first["failure"] == second["failure"] == ""


def test_a_process_that_fails_gives_its_last_word() -> None:
    with pytest.raises(WorkerError, match=r"the process ended with 1: KeyError: 'task'"):
        list(work({"threads": None}))


def test_a_case_whose_process_dies_does_not_end_the_others(
    monkeypatch: pytest.MonkeyPatch, here: list[Mapping[str, Any]]
) -> None:
    whole = process.work

    def fragile(job: Mapping[str, Any], memory: str = "as-is") -> Any:
        if job["task"] == "cases" and job["cases"][0]["shape"] == (4, 8):
            raise WorkerError("the process ended by signal 11")
        yield from whole(job, memory)

    monkeypatch.setattr(process, "work", fragile)
    found = measure("tiny", memory=["as-is"], rounds=1)
    assert [bool(record.failure) for record in found.records] == [True, True, False, False]


def test_an_exact_result_does_not_depend_on_the_layout() -> None:
    case = make_case(**SMALL)
    given = inputs(case)
    last = replace(given, x=given.x.detach().contiguous(memory_format=torch.channels_last))
    one, other = exact(case, given), exact(case, last)
    assert all(torch.equal(one.values[name], other.values[name]) for name in one.values)
