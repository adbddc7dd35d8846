"""The host's time for a layer: a chain measured here, and the report from numbers alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_helpers import MACHINE, timing

import batchnorm
from batchnorm.bench import HostTimes, chain, measure_host
from batchnorm.bench.hosting import host_case
from batchnorm.bench.plan import Settings
from batchnorm.bench.record import Record
from batchnorm.bench.timing import HostClock


@pytest.mark.parametrize("epilogue", ["none", "residual+relu"])
def test_a_chain_is_measured(epilogue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers: list[torch.nn.Module] = []

    def noted(*arguments: Any) -> torch.nn.Module:
        layers.append(built(*arguments))
        return layers[-1]

    built = chain.our_layer
    monkeypatch.setattr(chain, "our_layer", noted)
    case = host_case("channels-last", "float32", epilogue, "cpu", "reference")
    answer = json.loads(json.dumps(chain.chain_times(case, 2)))
    record = Record.read(case, answer)
    assert set(record.times) == {"forward", "forward+backward"}
    for times in record.times.values():
        assert set(times) == {"batchnorm", "eager"}
        assert all(0 < each.p20 <= each.p50 <= each.p80 < 0.02 for each in times.values())
        assert all(len(each.rounds) == 2 for each in times.values())
    assert record.backends == {"training": "reference"}
    # Every layer of the chain ran, and each with its own parameters.
    assert len({id(layer) for layer in layers}) == 50
    assert len({int(layer.num_batches_tracked) for layer in layers}) == 1
    assert int(layers[0].num_batches_tracked) > 4


def test_a_layers_time_is_a_fiftieth() -> None:
    whole = timing(0.5)
    layer = chain._of_a_layer(whole)
    assert (layer.p20, layer.p50, layer.p80) == pytest.approx((0.009, 0.01, 0.012))
    assert layer.rounds == pytest.approx((0.01, 0.011, 0.009))


def test_the_host_is_not_timed_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    HostClock("cuda").sample(lambda: order.append("call"), 2)
    HostClock("cpu").sample(lambda: order.append("call"), 1)
    assert order == ["wait", "call", "call", "wait", "call"]


def test_every_layout_type_and_epilogue(here: list[Mapping[str, Any]]) -> None:
    found = measure_host(dtypes=["float32", "bfloat16"], epilogues=["relu"], rounds=1, backend="aten")
    cases = [(each.case.layout, each.case.dtype, each.case.epilogue) for each in found.records]
    assert cases == [
        ("contiguous", "float32", "relu"),
        ("contiguous", "bfloat16", "relu"),
        ("channels-last", "float32", "relu"),
        ("channels-last", "bfloat16", "relu"),
    ]
    assert all(each.backends == {"training": "aten"} for each in found.records)
    machine, host = here
    assert (machine["measure_copy"], host["threads"], machine["backend"]) == (False, 1, "aten")


def test_the_report(tmp_path: Path) -> None:
    times = {
        name: {"batchnorm": timing(2e-5), "eager": timing(5e-5)} for name in ("forward", "forward+backward")
    }
    record = Record(
        host_case("contiguous", "float32", "relu", "cpu", None), backends={"training": "cpu"}, times=times
    )
    found = HostTimes(Settings(suites=(), epilogues=("relu",)), MACHINE, (record,), 2, interrupted=True)
    assert found.verdict == (
        "Batch norm (ReLU), contiguous, float32: the host needs 20.0 µs a layer, forward and backward, for torch.nn's "
        "50.0 µs (ratio 2.50)."
    )
    assert str(found).endswith("Interrupted: 1 of 2 cases are finished.")
    content = json.loads(found.to_json())
    assert (content["kind"], content["planned"], "suites" in content["settings"]) == ("host-times", 2, False)
    assert content["results"][0]["ratio"] == pytest.approx({"forward": 2.5, "forward+backward": 2.5})
    assert content["results"][0]["seconds_per_layer"]["forward"]["eager"]["p80"] == pytest.approx(6e-5)
    found.save(tmp_path / "host.html")
    assert "A layer in a chain of 50" in (tmp_path / "host.html").read_text()


def test_wrong_options() -> None:
    for options, part in (
        ({"epilogues": ["softmax"]}, "epilogue: got 'softmax'"),
        ({"rounds": 0}, "rounds: got 0"),
        ({"backend": "cuda"}, "backend: got 'cuda', expected of cpu, triton, aten, reference, auto"),
    ):
        with pytest.raises(batchnorm.InputError, match=part):
            measure_host(**options)


def test_a_backend_that_cannot_run_is_one_error_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(batchnorm.BackendError, match=r"--backend triton on cpu: got its kernels run on GPUs"):
        measure_host(backend="triton", rounds=1)
