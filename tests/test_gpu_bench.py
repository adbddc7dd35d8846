"""The benchmark on a CUDA device: a small case of everything that it measures.

`make test-gpu` runs this file with nothing installed but torch, triton and pytest: import nothing else here.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from batchnorm.bench import _worker, chain, cudnn_graphs, measure, measure_host, measure_steps, networks
from batchnorm.bench.case import OPERATIONS, Case
from batchnorm.bench.contenders import inputs, rival
from batchnorm.bench.hosting import host_case
from batchnorm.bench.timing import CudaClock, interleaved

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BACKENDS = [None, *(["triton"] if importlib.util.find_spec("triton") is not None else [])]
needs_cudnn = pytest.mark.skipif(
    importlib.util.find_spec("cudnn") is None, reason="nvidia-cudnn-frontend is not installed"
)


def case_of(epilogue: str = "relu", **changes: Any) -> Case:
    fields: dict[str, Any] = {
        "suite": "resnet50",
        "shape": (8, 64, 28, 28),
        "count": 1,
        "epilogue": epilogue,
        "layout": "channels-last",
        "dtype": "bfloat16",
        "device": "cuda",
        "threads": None,
        "memory": "as-is",
    }
    return Case(**{**fields, **changes})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("epilogue", ["none", "relu", "residual+relu"])
def test_layers_are_replayed_as_cuda_graphs(epilogue: str, backend: str | None) -> None:
    found = _worker.measure_case(case_of(epilogue, backend=backend), ["eager"], 2)
    assert (found["failure"], found["skipped"]) == ("", {})
    for task in OPERATIONS:
        for timing in found["times"][task].values():
            assert timing["replayed"]
            assert 0 < timing["p20"] <= timing["p50"] <= timing["p80"]


def test_against_torch_compile() -> None:
    found = _worker.measure_case(case_of("residual+relu"), ["eager", "compile"], 1)
    assert (found["failure"], found["skipped"]) == ("", {})
    assert set(found["times"]["forward+backward"]) == {"batchnorm", "eager", "compile"}


@needs_cudnn
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("epilogue", ["none", "relu", "residual", "residual+relu"])
def test_cudnns_graphs_compute_batch_norm(epilogue: str, dtype: str) -> None:
    case = case_of(epilogue, dtype=dtype)
    found = _worker.measure_case(case, ["eager", "cudnn"], 1)
    assert found["failure"] == ""
    # Which graphs there are depends on the GPU and on the version; a wrong one would be told as off.
    assert not any("off by" in reason or "failed" in reason for reason in found["skipped"].values()), found[
        "skipped"
    ]
    if not found["skipped"]:
        assert all(found["times"][task]["cudnn"]["replayed"] for task in OPERATIONS)


@needs_cudnn
def test_cudnn_has_the_forward_graph_of_batch_norm_and_relu() -> None:
    case = case_of("relu", dtype="float16")
    assert cudnn_graphs.why_not(case) == ""
    assert "forward" not in rival("cudnn", case, inputs(case)).lacks


def test_what_cannot_be_captured_is_launched_and_told() -> None:
    x = torch.ones(8, device="cuda")

    def waits() -> object:
        return x.sum().item()

    functions: dict[str, Callable[[], object]] = {"waits": waits, "adds": lambda: x + 1}
    times = interleaved(functions, CudaClock(), 1)
    assert (times["waits"].replayed, times["adds"].replayed) == (False, True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("epilogue", ["relu", "residual+relu"])
def test_the_hosts_time_for_a_layer(epilogue: str, backend: str | None) -> None:
    found = chain.chain_times(host_case("channels-last", "bfloat16", epilogue, "cuda", backend), 1)
    assert found["backends"]["training"] == (backend or "aten")
    for times in found["times"].values():
        assert all(0 < each["p50"] < 0.02 for each in times.values())


def test_processes_of_their_own() -> None:
    host = measure_host(layouts=["contiguous"], epilogues=["relu"], device="cuda", rounds=1)
    assert len(host.records) == 1
    layers = measure(["tiny"], device="cuda", rounds=1, backend="aten")
    assert not layers.failures
    assert set(layers.host) == {"batchnorm", "eager"}
    assert all(total.seconds["eager"] is not None for total in layers.totals)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["launched", "graph"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_training_steps(dtype: str, mode: str, backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(networks.BUILT_IN, "resnet10", ((1, 1, 1, 1), 1))
    job = {
        "task": "steps",
        "device": "cuda",
        "threads": None,
        "network": "resnet10",
        "layout": "channels-last",
        "dtype": dtype,
        "mode": mode,
        "batch": 8,
        "image": 64,
        "rounds": 2,
        "backend": backend,
    }
    setup, *rounds = _worker.answers(job)
    found = setup["setup"]
    assert (found["failure"], found["skipped"], found["norms"]) == ("", {}, 12)
    assert all(memory > 0 for memory in found["memory"].values())
    assert [set(answer["seconds"]) for answer in rounds] == [{"plain", "fused", "removed"}] * 2
    assert all(seconds > 0 for answer in rounds for seconds in answer["seconds"].values())


def test_a_replayed_step_trains_as_a_launched_one_does() -> None:
    from batchnorm.bench import steps

    job = {
        "device": "cuda",
        "layout": "channels-last",
        "dtype": "float32",
        "backend": None,
        "batch": 8,
        "image": 64,
    }
    weights = []
    for mode in ("launched", "graph"):
        torch.manual_seed(0)
        setting = steps._Setting({**job, "mode": mode})
        torch.manual_seed(1)
        model = networks.ResNet((1, 1, 1, 1), 1).cuda().to(memory_format=torch.channels_last)
        step = steps._Step(model, setting)
        step.optimizer.param_groups[0]["lr"] = 1e-2
        step.warm_up()
        if mode == "graph":
            step.captured()
        for _ in range(4):
            step.run()
        torch.cuda.synchronize()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    moved = (weights[0] - weights[1]).abs().max() / weights[0].abs().max()
    assert moved < 1e-2


def test_whole_training_steps_from_the_outside() -> None:
    found = measure_steps("resnet18", device="cuda", dtypes=["bfloat16"], batch=4, image=64, rounds=1)
    assert [record.case.mode for record in found.records] == ["launched", "graph"]
    assert not found.failures
