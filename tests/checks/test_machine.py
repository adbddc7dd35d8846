"""BN109 and BN112: this machine's speed and correctness. Times are made up: no test may depend on real ones."""

from typing import Any

import pytest
import torch
from rule_helpers import found, only
from run_helpers import clock, evidence
from torch import Tensor, nn

import batchnorm
from batchnorm.checks import _timing
from batchnorm.checks._oracle import BOUNDS, self_tested
from batchnorm.checks._state import norms_of
from batchnorm.checks._timing import timed


def net(norm: Any = nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 3, 2), norm(4))


def images(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [(torch.randn(4, 3, 12, 12) * 2 + 5).to(dtype) for _ in range(2)]


# BN112


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, batchnorm.BatchNorm2d, batchnorm.GhostBatchNorm, batchnorm.BatchRenorm]
)
def test_layers_are_right_here(norm: Any, dtype: torch.dtype) -> None:
    model, batches = net(norm).to(dtype), images(dtype)
    assert found(model, "BN112", batches=batches) == ()
    tested = self_tested(norms_of(model), evidence(model, batches).seen)
    for seen in tested.values():
        assert seen.error is not None
        assert seen.error_bound == BOUNDS[dtype]
        assert 0 < seen.error < BOUNDS[dtype] / 4


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, batchnorm.BatchNorm2d])
@pytest.mark.parametrize("wrong", ["forward", "backward", "nan"])
def test_a_backend_that_is_wrong(monkeypatch: pytest.MonkeyPatch, norm: type[nn.Module], wrong: str) -> None:
    right = norm.forward

    def forward(self: nn.Module, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = right(self, input, *args, **kwargs)
        if getattr(self, "backend", None) == "reference":
            return y
        if wrong == "forward":
            return y * 1.01
        if wrong == "nan":
            return y + torch.where(torch.arange(y.shape[0]) == 1, torch.nan, 0.0).view(-1, 1, 1, 1)
        return y * 1.01 - 0.01 * y.detach()

    model, batches = net(norm), images()
    monkeypatch.setattr(norm, "forward", forward)
    finding = only(model, "BN112", batches=batches)
    assert (finding.severity, finding.module) == ("error", "1")
    assert finding.evidence["error"] > 5e-3


def test_hooks_are_not_called_and_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = net(), images()
    seen = evidence(model, batches).seen
    model[1].register_forward_hook(lambda *args: pytest.fail("the self-test called a hook"))
    model[1].register_forward_pre_hook(lambda *args: pytest.fail("the self-test called a hook"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    self_tested(norms_of(model), seen)
    timed(norms_of(model), seen)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_cannot_be_run_by_itself_is_not_tested() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    for model in (net(Own), batchnorm.freeze(net()).model):
        tested = self_tested(norms_of(model), evidence(model, images()).seen)
        assert [seen.error for seen in tested.values()] == [None, None]


# BN109


def model_of_one(norm: Any = nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(norm(3))


def test_the_fastest_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fair, fast = [0.1, 3.0, 3.1, 3.2, 3.0, 9.0], [9.0] + [2.5] * 5, [9.0] + [1.0] * 5
    for ways, said in (
        ({(False, False): slow, (True, False): fast, (False, True): fair, (True, True): fair}, "layer"),
        (
            {(False, False): slow, (True, False): fair, (False, True): fast, (True, True): fair},
            "channels-last",
        ),
        (
            {(False, False): slow, (True, False): fair, (False, True): fair, (True, True): fast},
            "layer in channels-last",
        ),
    ):
        clock(monkeypatch, ways)
        finding = only(model_of_one(), "BN109", batches=images())
        assert (finding.severity, finding.module) == ("info", "0")
        assert finding.cause.endswith(said)
        assert finding.evidence["factor"] == pytest.approx(3.0)  # by the fastest run: 3.0, by the median: 3.1


def test_a_difference_that_is_small_or_not_reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    near, fast = [9.0] + [1.4] * 5, [9.0] + [1.0] * 5
    once = [9.0, 1.1, 5.0, 5.0, 5.0, 5.0]  # another program was busy: one run was as fast
    for slow in (near, once):
        ways = dict.fromkeys([(True, False), (False, True), (True, True)], fast)
        clock(monkeypatch, {(False, False): slow, **ways})
        assert found(model_of_one(), "BN109", batches=images()) == ()


def test_small_layers_are_not_timed() -> None:
    model = model_of_one()
    seen = evidence(model, [torch.randn(4, 3, 73, 73)]).seen
    assert timed(norms_of(model), seen)["0"].slow is None
    seen = evidence(model, [torch.randn(4, 3, 74, 74)]).seen  # above 65,536
    assert timed(norms_of(model), seen)["0"].slow is not None


def test_layers_are_timed_with_their_own_shapes_and_the_costliest_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_timing, "_LEAST", 0)
    model = nn.Sequential(*[nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.MaxPool2d(4)])
    model.append(nn.BatchNorm2d(2))
    seen = timed(norms_of(model), evidence(model, images()).seen)
    assert [seen[name].slow is not None for name in ("0", "2", "4")] == [True, True, False]
    assert all(each.slow is None or each.slow > 0 for each in seen.values())
    ours = model_of_one(batchnorm.BatchNorm2d)
    last = [batch.to(memory_format=torch.channels_last) for batch in images()]
    assert timed(norms_of(ours), evidence(ours, last).seen)["0"].slow is None  # there is no other way
