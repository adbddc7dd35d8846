"""Whole training steps: a small ResNet measured here, and the report from numbers alone."""

import copy
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_helpers import MACHINE
from model_packages import package
from rich.console import Console
from torch import nn

import batchnorm
from batchnorm.bench import Silent, TrainingSteps, measure_steps, networks, process, steps
from batchnorm.bench.networks import ResNet, network
from batchnorm.bench.training_steps import StepCase, StepRecord, StepSettings
from batchnorm.report import terminal

SMALL: dict[str, Any] = {"batch": 2, "image": 32, "rounds": 2}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(networks.BUILT_IN, "resnet10", ((1, 1, 1, 1), 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_are_measured(here: list[Mapping[str, Any]], dtype: str) -> None:
    found = measure_steps("resnet10", dtypes=[dtype], **SMALL)
    (record,) = found.records
    assert record.failure == ""
    assert record.skipped == {}
    assert (record.norms, record.left, record.backend) == (
        12,
        0,
        batchnorm.explain_backend(torch.ones(2, 1)).chosen,
    )
    assert [list(taken) for taken in record.rounds] == [["plain", "fused", "removed"]] * 2
    assert all(0 < seconds < 60 for taken in record.rounds for seconds in taken.values())
    assert record.off is not None
    assert 0 < record.off < (1e-4 if dtype == "float32" else 0.6)
    assert record.memory == {"plain": None, "fused": None, "removed": None}
    assert here[1]["layout"] == "channels-last"


def test_the_backend_that_is_asked_for(
    here: list[Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[nn.Module] = []
    whole = steps._Step.__init__

    def noted(self: Any, model: nn.Module, setting: Any) -> None:
        models.append(model)
        whole(self, model, setting)

    monkeypatch.setattr(steps._Step, "__init__", noted)
    found = measure_steps("resnet10", backend="reference", **{**SMALL, "rounds": 1})
    assert found.records[0].backend == "reference"
    plain, fused, removed = models
    assert {getattr(each, "backend", "") for each in fused.modules() if isinstance(each, nn.BatchNorm2d)} == {
        "reference"
    }
    assert all(type(each) is nn.BatchNorm2d for each in plain.modules() if isinstance(each, nn.BatchNorm2d))
    assert not any(isinstance(each, nn.BatchNorm2d) for each in removed.modules())


def test_a_fused_network_that_is_wrong_gets_no_time(
    here: list[Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: nn.Module) -> Any:
        changes = right(model)
        changes.model.bn1.eps = 100.0
        return changes

    right = steps.fuse
    monkeypatch.setattr(steps, "fuse", wrong)
    found = measure_steps("resnet10", **SMALL)
    assert len(found.failures) == 1
    assert "the fused network's first output is off by" in found.verdict
    assert found.records[0].rounds == []


def test_one_that_cannot_run_is_named(here: list[Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(model: nn.Module) -> Any:
        return SimpleNamespace(model=nn.Sequential(nn.Flatten(), nn.Linear(3, 1000)))

    monkeypatch.setattr(steps, "remove", too_large)
    found = measure_steps("resnet10", **{**SMALL, "rounds": 1})
    (record,) = found.records
    assert record.skipped["removed"].startswith("mat1 and mat2 shapes cannot be multiplied")
    assert list(record.rounds[0]) == ["plain", "fused"]
    assert record.cost_left is None
    assert (
        "Batch norms removed, channels-last, float32, launched by the host: no time, because mat1"
        in shown(found)
    )


class AfterOneRound(Silent):
    """Ctrl-C when a round is finished."""

    def __init__(self, ctrl_c: Callable[[], None], rounds: int) -> None:
        self.ctrl_c, self.left = ctrl_c, rounds

    def case_finished(self, label: str, effort: float, outcome: str) -> None:
        self.left -= 1
        if self.left == 0:
            self.ctrl_c()


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a worker says in place of measuring."""
    said: list[dict[str, Any]] = [{"setup": {"norms": 12, "backend": "cpu"}}]
    said += [{"seconds": {"plain": 0.3, "fused": 0.2, "removed": 0.1}}] * 3

    def work(job: Mapping[str, Any], memory: str = "as-is") -> Iterator[dict[str, Any]]:
        yield from [{"machine": dict(MACHINE)}] if job["task"] == "machine" else said

    monkeypatch.setattr(process, "work", work)
    return said


@pytest.mark.usefixtures("answers")
def test_ctrl_c_keeps_the_rounds_that_are_finished(ctrl_c: Callable[[], None]) -> None:
    found = measure_steps(
        "resnet18", dtypes=["float32", "bfloat16"], rounds=3, progress=AfterOneRound(ctrl_c, 2)
    )
    assert found.interrupted
    assert [len(record.rounds) for record in found.records] == [2]
    assert found.incomplete == "Interrupted: 2 of 6 rounds are finished."


def test_ctrl_c_before_the_first_round(answers: list[dict[str, Any]], ctrl_c: Callable[[], None]) -> None:
    class AtOnce(Silent):
        def case_started(self, label: str) -> None:
            ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        measure_steps("resnet18", progress=AtOnce())


def test_on_a_gpu_each_case_is_launched_and_replayed(answers: list[dict[str, Any]]) -> None:
    found = measure_steps("resnet18", device="cuda", dtypes=["bfloat16", "float16"], rounds=3)
    assert [(each.case.dtype, each.case.mode) for each in found.records] == [
        ("bfloat16", "launched"),
        ("bfloat16", "graph"),
        ("float16", "launched"),
        ("float16", "graph"),
    ]
    assert found.settings.batch == 128


def test_no_such_network_is_one_error(here: list[Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(
        batchnorm.InputError, match=r"needs the package torchvision, which is not installed\. Run: pip"
    ):
        measure_steps("mobilenet_v2", **SMALL)
    for options, part in (
        ({"image": 8}, "image: got 8, expected at least 32 pixels"),
        ({"dtypes": ["float64"]}, "dtype: got 'float64'"),
        ({"batch": 1}, "batch: got 1"),
    ):
        with pytest.raises(batchnorm.InputError, match=part):
            measure_steps("resnet10", **options)


def test_a_torchvision_for_another_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **keywords: Any) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(networks, "require", fails)
    with pytest.raises(
        batchnorm.MissingDependencyError, match=r"does not fit this PyTorch \(operator torchvision::nms"
    ):
        network("mobilenet_v2")


@pytest.mark.packages
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_built_in_networks_are_torchvisions(name: str) -> None:
    ours, theirs = network(name).eval(), package("torchvision.models").get_model(name, weights=None).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.packages
def test_a_network_of_torchvision(here: list[Mapping[str, Any]]) -> None:
    package("torchvision.models")
    found = measure_steps("mobilenet_v2", batch=4, image=64, rounds=1)
    assert (found.records[0].failure, found.records[0].norms) == ("", 52)
    with pytest.raises(batchnorm.InputError, match="network: got 'resnet49', expected resnet18, resnet50"):
        measure_steps("resnet49", **SMALL)


@pytest.mark.parametrize("expansion", [1, 4])
def test_a_fused_network_compiles_without_a_graph_break(expansion: int) -> None:
    """A training step, forward and backward, in one graph; and every batch norm of the network is fused."""
    changes = batchnorm.fuse(ResNet((1, 1, 1, 1), expansion, classes=5).train())
    assert len(changes.skipped) == 0
    net = changes.model
    twin, x = copy.deepcopy(net), torch.randn(2, 3, 32, 32)
    explained = torch._dynamo.explain(copy.deepcopy(net))(x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    dy = torch.randn(2, 5)
    for model in (compiled, twin):
        model(x).backward(dy)
    for (name, got), want in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(
            got.grad, want.grad, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    torch.testing.assert_close(dict(net.named_buffers()), dict(twin.named_buffers()))


def record(mode: str = "launched", **changes: Any) -> StepRecord:
    rounds = [
        {"plain": 0.030, "fused": 0.024, "removed": 0.018},
        {"plain": 0.032, "fused": 0.024, "removed": 0.020},
    ]
    fields: dict[str, Any] = {"norms": 53, "backend": "triton", "rounds": rounds}
    fields["memory"] = {"plain": 9_000_000_000, "fused": 8_000_000_000, "removed": 7_000_000_000}
    return StepRecord(StepCase("channels-last", "bfloat16", mode), **{**fields, **changes})


def result(*records: StepRecord, **changes: Any) -> TrainingSteps:
    settings = StepSettings(
        "resnet50", ("channels-last",), ("bfloat16",), "cuda", 128, 224, None, 2, "triton"
    )
    return TrainingSteps(settings, MACHINE, records, len(records), **changes)


def shown(found: TrainingSteps) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(terminal.render(found.document()))
    return console.export_text()


def test_the_figures() -> None:
    found = record()
    assert found.ratio("fused") == pytest.approx((30 / 24 + 32 / 24) / 2)
    assert found.cost_left == pytest.approx(5 / 12)
    assert record(rounds=[{"plain": 0.2, "fused": 0.1, "removed": 0.3}]).cost_left is None


def test_the_report(tmp_path: Path) -> None:
    found = result(record(), record("graph"), record(failure="the fused network: out of memory", rounds=[]))
    assert found.verdict.startswith(
        "channels-last, bfloat16, launched by the host: failed: the fused network: out of"
    )
    assert (
        "resnet50, 128 images of 224², channels-last, bfloat16, replayed as one CUDA graph: a training step takes "
        "31.0 ms, with its batch norms fused 24.0 ms (ratio 1.29), without them 19.0 ms." in found.verdict
    )
    text = " ".join(shown(found).split())
    for part in ("53 batch norms on triton", "31.0 (30.4–31.6) ms", "42%", "9.00 GB", "batch norms removed"):
        assert part in text, part
    content = json.loads(found.to_json())
    assert (content["kind"], len(content["results"])) == ("training-steps", 3)
    first = content["results"][0]
    plain = first["seconds"]["plain"]
    assert [plain["p20"], plain["p50"], plain["p80"], *plain["rounds"]] == pytest.approx(
        [0.0304, 0.031, 0.0316, 0.03, 0.032]
    )
    assert first["peak_bytes"]["fused"] == 8_000_000_000
    found.save(tmp_path / "steps.html")
    assert "Training steps on this machine" in (tmp_path / "steps.html").read_text()
    assert result().verdict == "Nothing was timed."
