"""cuDNN's fused graphs as a contender: against a stand-in for the package, which checks what it is called with."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import cudnn_fake
import pytest
import torch
from bench_helpers import MACHINE, make_case

from batchnorm.bench import Benchmark, _worker, contenders, cudnn_graphs
from batchnorm.bench.accuracy import complaint, errors, exact
from batchnorm.bench.case import Case
from batchnorm.bench.contenders import Contender, inputs, rival
from batchnorm.bench.plan import Settings
from batchnorm.bench.record import Record

EPILOGUES = ("none", "relu", "residual", "residual+relu")


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The package, for tensors on the CPU."""
    fake = importlib.reload(cudnn_fake)
    monkeypatch.setitem(sys.modules, "cudnn", fake)
    monkeypatch.setattr(cudnn_graphs, "_stream", lambda device: 11)
    monkeypatch.setattr(
        contenders, "why_not", lambda case: cudnn_graphs.why_not(replace(case, device="cuda"))
    )
    cudnn_graphs._handle.cache_clear()
    yield fake
    cudnn_graphs._handle.cache_clear()


def case_of(epilogue: str, **changes: Any) -> Case:
    fields = {"shape": (4, 6, 5, 5), "layout": "channels-last", "dtype": "bfloat16", "epilogue": epilogue}
    return make_case(**{**fields, **changes})


def made(case: Case) -> Contender:
    return rival("cudnn", case, inputs(case))


@pytest.mark.parametrize("shape", [(4, 6, 5, 5), (2, 8, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_the_graphs_compute_batch_norm(cudnn: Any, epilogue: str, dtype: str, shape: tuple[int, ...]) -> None:
    case = case_of(epilogue, dtype=dtype, shape=shape)
    given = inputs(case)
    found = rival("cudnn", case, given)
    assert found.lacks == {}
    off = errors(found.function, found.layer, exact(case, given))
    assert ("dresidual" in off) == ("residual" in epilogue)
    assert complaint(off, given.x.dtype, "aten") == ""


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_a_graph_a_direction(cudnn: Any, epilogue: str) -> None:
    made(case_of(epilogue))
    built = [name for name, _ in cudnn.calls if name not in ("set_stream", "create_handle")]
    add, relu = ["add"] * ("residual" in epilogue), ["relu"] * ("relu" in epilogue)
    mask, backward = [], []
    if epilogue == "residual+relu":
        mask, backward = ["cmp_gt with a number"], ["scale"]
    elif epilogue == "relu":
        backward = ["batchnorm_inference", "relu_backward"]
    forward = ["batchnorm", *add, *relu, *mask]
    assert built == [*forward, *backward, "batchnorm_backward", "batchnorm_inference", *add, *relu]
    # Forward, forward and backward, inference: each was run once, on the current stream.
    streams = [arguments for name, arguments in cudnn.calls if name == "set_stream"]
    assert streams == [{"handle": 7, "stream": 11}] * 4
    assert [name for name, _ in cudnn.calls].count("create_handle") == 1


def test_statistics_move_as_pytorchs_do(cudnn: Any) -> None:
    case = case_of("relu")
    given = inputs(case)
    ours, theirs = rival("cudnn", case, given).layer, rival("eager", case, given).layer
    contenders.reset_statistics(ours, given)
    ours.train()(given.x)
    theirs(given.x)
    torch.testing.assert_close(ours.running_mean, theirs.norm.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.norm.running_var, rtol=1e-3, atol=1e-3)
    before = int(ours.num_batches_tracked)
    ours.eval()(given.x)
    assert (before, int(ours.num_batches_tracked)) == (3, 3)


def test_a_mask_by_zeros_where_a_number_is_not_taken(cudnn: Any) -> None:
    cudnn.refused.add("cmp_gt with a number")
    case = case_of("residual+relu")
    given = inputs(case)
    found = rival("cudnn", case, given)
    assert found.lacks == {}
    assert complaint(errors(found.function, found.layer, exact(case, given)), given.x.dtype, "aten") == ""


def test_without_an_engine_for_backward_forward_is_timed(cudnn: Any) -> None:
    cudnn.refused.add("batchnorm_backward")
    answer = _worker.measure_case(case_of("relu"), ["eager", "cudnn"], 1)
    record = Record.read(case_of("relu"), answer)
    assert record.skipped == {
        "cudnn in forward+backward": "cuDNN has no such graph here (no engine for batchnorm_backward)"
    }
    assert set(record.times["forward"]) == set(record.times["inference"]) == {"batchnorm", "eager", "cudnn"}
    assert set(record.times["forward+backward"]) == {"batchnorm", "eager"}
    assert set(record.errors["cudnn"]) == {"y", "y of inference"}
    assert record.error("cudnn") == record.errors["cudnn"]["y"]
    assert record.ratio("forward+backward", "cudnn") is None


def test_without_any_engine_there_is_a_reason(cudnn: Any) -> None:
    cudnn.refused.update({"batchnorm", "batchnorm_inference"})
    answer = _worker.measure_case(case_of("none"), ["cudnn"], 1)
    assert answer["skipped"] == {"cudnn": "cuDNN has no such graph here (no engine for batchnorm)"}
    assert set(answer["times"]["forward"]) == {"batchnorm"}


def test_a_graph_that_fails_when_it_runs_is_no_crash(cudnn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("CUDNN_STATUS_EXECUTION_FAILED")

    monkeypatch.setattr(cudnn.pygraph, "execute", broken)
    with pytest.raises(RuntimeError, match="cuDNN's graph failed: CUDNN_STATUS_EXECUTION_FAILED"):
        made(case_of("relu"))


def test_a_wrong_graph_is_not_compared_with(cudnn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cudnn.pygraph.batchnorm_backward
    monkeypatch.setattr(
        cudnn.pygraph,
        "batchnorm_backward",
        lambda self, **given: right(self, **{**given, "scale": given["mean"]}),
    )
    answer = _worker.measure_case(case_of("relu"), ["eager", "cudnn"], 1)
    assert answer["failure"] == ""
    assert answer["skipped"]["cudnn"].startswith("dx is off by")
    assert all("cudnn" not in times and "eager" in times for times in answer["times"].values())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "cuDNN's graphs run on CUDA devices"),
        ({"layout": "contiguous"}, "take channels-last input in bfloat16 or float16"),
        ({"dtype": "float32"}, "take channels-last input in bfloat16 or float16"),
        ({"epilogue": "relu6"}, "have ReLU and no other activation"),
        (
            {},
            "the package nvidia-cudnn-frontend, which is not installed. Run: pip install nvidia-cudnn-frontend",
        ),
    ],
    ids=str,
)
def test_why_not(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], reason: str) -> None:
    monkeypatch.setitem(sys.modules, "cudnn", None)
    case = case_of(**{"epilogue": "relu", "device": "cuda", **changes})
    assert reason in cudnn_graphs.why_not(case)


def test_without_the_package_the_case_is_measured_all_the_same() -> None:
    answer = _worker.measure_case(case_of("relu"), ["eager", "cudnn"], 1)
    assert answer["skipped"] == {"cudnn": "cuDNN's graphs run on CUDA devices"}
    assert answer["failure"] == ""


def test_the_report_has_a_dash_and_the_reason(result: Benchmark) -> None:
    def with_cudnn(record: Record, only: str) -> Record:
        times = {
            task: {**each, "cudnn": each["eager"]} if task != only else each
            for task, each in record.times.items()
        }
        return replace(record, times=times)

    changed = tuple(
        with_cudnn(record, "forward+backward" if record.case.epilogue == "residual+relu" else "")
        for record in result.records
    )
    settings = Settings(suites=("resnet50",), against=("eager", "cudnn"))
    found = Benchmark(settings, MACHINE, 30e9, 31e9, changed, len(changed))
    tables = [
        block for section in found.document().sections for block in section.blocks if hasattr(block, "rows")
    ]
    rows = [
        row for table in tables for row in table.rows if row[0].startswith("16×256×14²") and "cuDNN" in row[2]
    ]
    assert [row for row in rows if "\n–" in row[3] and row[-1] == "–"]
    assert [row for row in rows if "\n–" not in row[3]]
    totals = {(t.operation, t.layout, t.memory): t.seconds["cudnn"] for t in found.totals}
    assert totals["forward+backward", "contiguous", "as-is"] is None
    assert totals["forward", "contiguous", "as-is"] == pytest.approx(0.03 * 1.5 + 6 * 0.006 + 5 * 0.006)
