"""SyncBatchNorm with two, three and four processes on gloo, against one process with the whole batch."""

import copy
import pickle
from typing import Any

import pytest
import sync_worker as worker
import torch
from helpers import same_bits
from sync_cases import CASES, CHANNELS, Case, cat, close, whole
from torch import Tensor, nn

import batchnorm
from batchnorm.policies import sync

# Of the largest value: what float32 outputs and gradients may differ by. bfloat16 is compared at its own rounding.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-8}


@pytest.fixture(
    scope="module",
    params=[2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)],
    ids=lambda world: f"{world} processes",
)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return worker.together(request.param, tmp_path_factory.mktemp("sync"))


def expected(case: Case, world: int) -> tuple[list[list[Tensor]], Tensor, Tensor]:
    """Batch norm of the whole batch by its formula, in float64: outputs, gradients, running statistics."""
    layer = case.load(batchnorm.SyncBatchNorm(CHANNELS, affine=case.affine))
    parameters = [p.detach().double().requires_grad_() for p in layer.parameters()]
    acts = {None: lambda z: z, "leaky_relu": lambda z: nn.functional.leaky_relu(z, 0.01)}
    act = acts.get(case.activation) or getattr(nn.functional, case.activation)
    mean_run, var_run = torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double()
    steps = []
    for step in range(case.steps):
        parts = case.tensors(step, world)
        x, dy, residual, mask = (
            cat([part[name] for part in parts]) for name in ("x", "dy", "residual", "mask")
        )
        x = x.double().requires_grad_()
        w = torch.ones_like(x[:, :1]) if mask is None else mask.unsqueeze(1).double()
        axes = [axis for axis in range(x.dim()) if axis != 1]
        n = w.sum()
        mean = (w * x).sum(axes, keepdim=True) / n
        var = (w * (x - mean) ** 2).sum(axes, keepdim=True) / n
        z = (x - mean) / (var + 1e-5).sqrt()
        if parameters:
            z = z * parameters[0].view_as(mean) + parameters[1].view_as(mean)
        wanted = [x, *parameters]
        if residual is not None:
            residual = residual.double().requires_grad_()
            z = z + residual
            wanted.append(residual)
        y = torch.where(w > 0, act(z), 0.0)
        steps.append([y.detach(), *torch.autograd.grad(y, wanted, dy.double())])
        share = 1 / (step + 1) if case.momentum is None else case.momentum
        with torch.no_grad():
            mean_run = (1 - share) * mean_run + share * mean.flatten()
            var_run = (1 - share) * var_run + share * (var.flatten() * n / (n - 1))
    return steps, mean_run, var_run


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", ["gather", "reduce"])
def test_processes_are_one_process_with_the_whole_batch(
    results: list[dict[str, Any]], way: str, name: str
) -> None:
    case, world = CASES[name], len(results)
    found = [result["cases"][f"{way}: {name}"] for result in results]
    steps, mean, var = expected(case, world)
    plain = whole(case, world)
    tolerance = TOLERANCE[case.dtype]
    # At 10⁴ σ the sums about a pivot of 0 lose 2.2e-16·10⁸; a float64 mean of 10 σ has its own last digit.
    if case.dtype == torch.float64 and way == "reduce":
        tolerance = 1e-11
    for step, wanted in enumerate(steps):
        y, dx, *rest = zip(*(part["steps"][step] for part in found), strict=True)
        per_sample = [y, dx, *([rest.pop()] if case.residual else [])]
        per_sample_wanted = [wanted[0], wanted[1], *([wanted[-1]] if case.residual else [])]
        for got, want in zip(per_sample, per_sample_wanted, strict=True):
            close(torch.cat(got), want, tolerance)
        for got, want in zip(rest, wanted[2:], strict=False):  # of γ and β: each process has its part's
            close(torch.stack(got).double().sum(0), want, max(tolerance, 1e-12))
        for got, want in zip([torch.cat(y), torch.cat(dx)], plain["steps"][step], strict=False):
            close(got, want.double(), tolerance)
    buffers = [part["buffers"] for part in found]
    close(buffers[0]["running_mean"], mean, 1e-6)
    close(buffers[0]["running_var"], var, 1e-6)
    assert buffers[0]["num_batches_tracked"] == case.steps
    for other in buffers[1:]:
        assert all(same_bits(other[key], value) for key, value in buffers[0].items())
    for key, value in plain["buffers"].items():
        close(buffers[0][key], value.double(), 1e-6)


def test_an_empty_process_gets_gradients_of_its_shape(results: list[dict[str, Any]]) -> None:
    y, dx, dweight, dbias = results[1]["cases"]["gather: one empty"]["steps"][0]
    assert y.shape == dx.shape == (0, CHANNELS, 4, 3)
    assert not dweight.any()
    assert not dbias.any()
    assert dweight.shape == dbias.shape == (CHANNELS,)


def test_both_ways_of_exchange_at_an_offset(results: list[dict[str, Any]]) -> None:
    every = torch.cat([worker.offset_share(rank) for rank in range(len(results))])
    mean, var = every.mean(0), every.var(0, correction=0)

    def off(name: str) -> float:
        found = [result["statistics"][name] for result in results]
        assert all(same_bits(found[0], other) for other in found)
        assert (found[0][0] / mean - 1).abs().max() < 1e-15
        return (found[0][1] / var - 1).abs().max().item()

    # The processes' means themselves are float64 numbers near 10⁴: their last digit is 1e-12 of σ.
    assert off("gather") < 2e-12
    # The bound of the sums about a pivot: 2.2e-16·(distance / σ)², here with a distance of 10⁴ σ, and of 0.1.
    assert 1e-11 < off("far") < 1e-7
    assert off("near") < 2e-12
    # Below it the two agree to float32's digits, and closer than that.
    for name in ("offset 10000", "uneven", "weights"):
        for result in results:
            gathered, reduced = (
                result["cases"][f"{way}: {name}"]["steps"][-1] for way in ("gather", "reduce")
            )
            for first, second in zip(gathered, reduced, strict=True):
                close(first, second.double(), 2e-7)


def test_collectives(results: list[dict[str, Any]]) -> None:
    gather = (
        "all_gather_single" if hasattr(torch.distributed, "all_gather_single") else "all_gather_into_tensor"
    )
    for result in results:
        assert result["collectives"] == {
            "gather forward": [gather],
            "gather backward": ["all_reduce"],
            "gather eval": [],
            "reduce forward": ["all_reduce"],
            "reduce backward": ["all_reduce"],
            "reduce eval": [],
        }


def test_a_backend_that_gathers_into_lists(results: list[dict[str, Any]]) -> None:
    inputs = [part["x"] for part in Case().tensors(0, len(results))]
    y = batchnorm.BatchNorm2d(CHANNELS)(torch.cat(inputs))
    close(torch.cat([result["mpi"] for result in results]), y.double(), 1e-6)


def test_distributed_data_parallel(results: list[dict[str, Any]]) -> None:
    world = len(results)
    model = worker.network()
    model[1] = batchnorm.convert(model[1], batchnorm.BatchNorm1d).model
    for step in range(3):
        parts = [worker.share(rank, step) for rank in range(world)]
        x, dy = (torch.cat(each) for each in zip(*parts, strict=True))
        model.zero_grad()
        model(x).backward(dy)
        for i, parameter in enumerate(model.parameters()):
            for result in results:
                got = result["wrapped"]["gradients"][step][i]
                torch.testing.assert_close(got, parameter.grad / world, rtol=1e-5, atol=1e-6)
                assert same_bits(got, results[0]["wrapped"]["gradients"][step][i])
    for name, value in model.state_dict().items():
        for result in results:
            torch.testing.assert_close(result["wrapped"]["state"][name], value, rtol=1e-6, atol=1e-6)
            assert same_bits(result["wrapped"]["state"][name], results[0]["wrapped"]["state"][name])


def test_a_group_of_some(results: list[dict[str, Any]]) -> None:
    world = len(results)
    inputs = [part["x"] for part in Case().tensors(0, world)]
    members = sorted({0, world - 1})
    for rank, result in enumerate(results):
        plain, some = batchnorm.BatchNorm2d(CHANNELS), result["some"]
        y = plain(torch.cat([inputs[each] for each in members]) if rank in members else inputs[rank])
        if rank in members:
            y = y.split([len(inputs[each]) for each in members])[members.index(rank)]
        torch.testing.assert_close(some["y"], y, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(some["var"], plain.running_var)
        assert some["same group"]
        assert same_bits(some["twin"], some["y"])
        assert "process_group=" in some["repr"]


def test_one_value_per_channel_in_all_processes(results: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(results):
        found, shape = result["single"], (1 if rank == 0 else 0, 3)
        for way in ("gather", "reduce"):
            assert found[f"error {way}"].startswith("Expected more than 1 value per channel when training")
            y, dx, buffers = found[f"zero {way}"]
            torch.testing.assert_close(y, torch.full(shape, 0.25))
            assert not dx.any()
            torch.testing.assert_close(buffers["running_mean"], torch.full((3,), 5 * 0.9 + 7 * 0.1))
            torch.testing.assert_close(buffers["running_var"], torch.full((3,), 4.0))
            assert buffers["num_batches_tracked"] == 1
            y, dx, buffers = found[f"running {way}"]
            torch.testing.assert_close(y, torch.full(shape, 0.25 + (7 - 5) / (4 + 1e-5) ** 0.5))
            torch.testing.assert_close(dx, torch.full(shape, 1 / (4 + 1e-5) ** 0.5))
            assert buffers["running_mean"].tolist() == [5.0] * 3
            assert buffers["running_var"].tolist() == [4.0] * 3
            assert buffers["num_batches_tracked"] == 0
        assert "Expected more than 1 value per channel" in found["running without"]
        values = torch.arange(len(results), dtype=torch.float64)
        exact = (rank - values.mean()) / (values.var(correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(found["one each"], exact.float().expand(1, 3))
        assert not found["one valid"].any()


def test_what_is_refused(results: list[dict[str, Any]]) -> None:
    for result in results:
        found = result["refused"]
        assert found["second"].startswith(
            "ModelError: second derivatives of a layer whose statistics are those of"
        )
        assert found["func"].startswith("ModelError: function transforms (torch.func) of a layer")
        assert found["vmap"].startswith("ModelError: function transforms")
        assert found["group"].startswith("InputTypeError: process_group: got str")
        assert found["pivots"].startswith("ModelError: SyncBatchNorm: got running means that differ")
        assert (found["same pivots"], found["no pivot"], found["finite"]) == ("none", "none", "True")


def test_a_nan_stays_in_its_channel(results: list[dict[str, Any]]) -> None:
    others = [0, *range(2, CHANNELS)]
    for result in results:
        for way in ("gather", "reduce"):
            clean, poisoned = (result["poisoned"][f"{name} {way}"] for name in ("clean", "poisoned"))
            for before, after in zip(clean[:2], poisoned[:2], strict=True):
                assert same_bits(before[:, others].contiguous(), after[:, others].contiguous())
                assert after[:, 1].isnan().all()
            for before, after, start in zip(clean[2:], poisoned[2:], (0.0, 1.0), strict=True):
                assert same_bits(before[others], after[others])
                assert after[1] == start  # nonfinite="skip"


def test_constant_channels(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["constants"]["gather"].abs().max() < 1e-5
        # The mean is a float64 number: at 10⁸ it is off by 1.5e-8, which 1/√ε makes 5e-6.
        assert result["constants"]["reduce"].abs().max() < 1e-5


def test_convert_there_and_back(results: list[dict[str, Any]]) -> None:
    world = len(results)
    found = [result["converted"] for result in results]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    # The layer in place 1 did a ReLU; here one stands behind it.
    state = {
        name.replace("2.", "3.", 1) if name[0] == "2" else name: v for name, v in found[0]["state"].items()
    }
    model.load_state_dict(state)
    y = model(torch.cat([each["x"] for each in found]))
    close(torch.cat([each["y"] for each in found]), y.detach().double(), 1e-6)
    for rank in range(world):
        assert found[rank]["group"] == [True, True]
        assert found[rank]["back"] == [True, True]
        assert found[rank]["no group"]
        was_torch, reasons = found[rank]["torch"]
        assert was_torch
        assert ["activation 'relu'" in reason for reason in reasons] == [True]


def test_without_other_processes_it_is_plain_batch_norm() -> None:
    """Before init_process_group; the positions of the arguments are those of PyTorch's SyncBatchNorm."""
    for shape in [(6, 3), (6, 3, 4), (6, 3, 4, 2), (2, 3, 4, 2, 2)]:
        kind = {2: batchnorm.BatchNorm1d, 3: batchnorm.BatchNorm1d, 4: batchnorm.BatchNorm2d}
        plain = kind.get(len(shape), batchnorm.BatchNorm3d)(3, activation="relu")
        layer = batchnorm.SyncBatchNorm(
            3, 1e-5, 0.1, True, True, None, "cpu", torch.float32, activation="relu"
        )
        x = torch.randn(shape)
        mask = torch.rand(shape[0], *shape[2:]) < 0.7
        for mode in (True, False):
            got, want = (each.train(mode)(x, residual=x, mask=mask) for each in (layer, plain))
            assert same_bits(got, want)
        assert all(same_bits(value, plain.state_dict()[name]) for name, value in layer.state_dict().items())


def test_it_is_a_batch_norm_that_can_be_kept() -> None:
    layer = batchnorm.SyncBatchNorm(3, single="zero", bias=False)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert not isinstance(layer, nn.SyncBatchNorm)  # DistributedDataParallel refuses that one on a CPU
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.state_dict().keys() == layer.state_dict().keys()
        assert (copied.single, copied.bias, copied.process_group) == ("zero", None, None)
        copied(torch.randn(1, 3))
    with pytest.raises(batchnorm.InputError, match="more than 1 value per channel"):
        batchnorm.SyncBatchNorm(3)(torch.randn(1, 3))
    with pytest.raises(batchnorm.InputTypeError, match="process_group: got int"):
        batchnorm.SyncBatchNorm(3, process_group=2)
    nn.SyncBatchNorm(3).load_state_dict(batchnorm.SyncBatchNorm(3).state_dict())
    assert "process_group" not in repr(layer)


def test_the_hash_of_the_pivot_depends_on_every_place() -> None:
    pivot = torch.randn(64, dtype=torch.float64)
    digest = sync._digest
    found = {digest(pivot).item()}
    for place in range(64):
        other = pivot.clone()
        other[place] = torch.nextafter(other[place], torch.tensor(9.0, dtype=torch.float64))
        found.add(digest(other).item())
    found.add(digest(pivot.flip(0)).item())
    assert len(found) == 66
    assert all(0 <= value < 2**20 and value == int(value) for value in found)
    assert digest(pivot) == digest(pivot.clone())
