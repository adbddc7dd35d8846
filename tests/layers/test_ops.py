"""The registered operators: groups against a loop, primitives against the whole, and torch's own checks."""

import itertools
from typing import Any

import pytest
import torch
from helpers import ACTIVATIONS, RELU_LIKE, SLOPE, error, lay_out, leaf, oracle
from torch import Tensor

import batchnorm.ops  # noqa: F401 - registers the operators
from batchnorm.kernels import cpu

OPS = torch.ops.batchnorm
EPS = 1e-3
GROUPS, SAMPLES, CHANNELS, POSITIONS = 3, 4, 2, 5
SHAPE = (GROUPS * SAMPLES, CHANNELS, POSITIONS)
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
Named = dict[str, Tensor | None]
BACKEND = "reference"


@pytest.fixture(params=["reference", "cpu"], autouse=True)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "cpu" and not cpu.available():
        pytest.skip(cpu.why_not())
    monkeypatch.setattr(request.module, "BACKEND", request.param)


def draw(weights: str, residual: bool, masked: bool, dtype: torch.dtype = torch.float64) -> Named:
    """The tensors of a call; weight and bias (C,) or (G, C) or none."""
    shape = {"none": None, "C": (CHANNELS,), "GC": (GROUPS, CHANNELS)}[weights]
    mask = torch.randint(
        0, 4, (SHAPE[0], POSITIONS)
    ).double()  # frequencies: a bool cannot show a lost weight
    return {
        "input": (torch.randn(SHAPE) * 2 + torch.arange(SHAPE[0]).reshape(-1, 1, 1)).to(dtype),
        "weight": None if shape is None else torch.randn(shape).to(dtype) + 2,
        "bias": None if shape is None else torch.randn(shape).to(dtype),
        "residual": torch.randn(SHAPE).to(dtype) if residual else None,
        "mask": mask if masked else None,
    }


def part(given: Named, group: int) -> Named:
    """What the call has of one group."""
    rows = slice(group * SAMPLES, (group + 1) * SAMPLES)
    out: Named = {}
    for name, value in given.items():
        if value is None:
            out[name] = None
        elif name in ("weight", "bias"):
            out[name] = value[group] if value.dim() == 2 else value
        else:
            out[name] = value[rows]
    return out


def forward(given: Named, groups: int, activation: str | None) -> tuple[Tensor, ...]:
    return tuple(OPS.forward(*given.values(), groups, EPS, activation, SLOPE, BACKEND))


def kept(given: Named, saved: Tensor, activation: str | None) -> Tensor:
    """What backward asks for: the bit mask, or the residual where the pre-activation is computed again."""
    again = given["residual"] is not None and activation not in (None, *RELU_LIKE)
    return given["residual"] if again else saved


CASES = list(itertools.product(["none", "C", "GC"], [False, True], [False, True]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("weights", "residual", "masked"), CASES, ids=str)
def test_groups_are_a_loop(weights: str, residual: bool, masked: bool, activation: str | None) -> None:
    given = draw(weights, residual, masked)
    dy = torch.randn(SHAPE, dtype=torch.float64)
    y, mean, var, count, saved = forward(given, GROUPS, activation)
    assert mean.shape == var.shape == (GROUPS, CHANNELS)
    assert mean.dtype == var.dtype == torch.float64
    leaves = {name: leaf(value) if name != "mask" else value for name, value in given.items()}
    wanted = [name for name in ("input", "residual", "weight", "bias") if leaves[name] is not None]
    by_autograd = dict(
        zip(
            wanted,
            torch.autograd.grad(
                forward(leaves, GROUPS, activation)[0], [leaves[name] for name in wanted], dy
            ),
            strict=True,
        )
    )
    backward = OPS.backward(
        dy, given["input"], mean, var, count, given["weight"], given["bias"], kept(given, saved, activation), residual,
        given["mask"], EPS, activation, SLOPE, BACKEND,
    )  # fmt: skip
    by_op = dict(zip(["input", "weight", "bias", "residual"], backward, strict=True))
    sums: dict[str, list[Any]] = {"weight": [], "bias": []}
    for group in range(GROUPS):
        rows = slice(group * SAMPLES, (group + 1) * SAMPLES)
        expected = oracle(dy=dy[rows], eps=EPS, activation=activation, **relabel(part(given, group)))
        assert error(y[rows], expected.output) < 1e-13
        assert error(mean[group], expected.mean) < 1e-13
        assert error(var[group], expected.var) < 1e-13
        assert error(count.expand(GROUPS, CHANNELS)[group], expected.count) == 0
        for results in (by_autograd, by_op):
            assert error(results["input"][rows], expected.grad_input) < 1e-12
            if residual:
                assert error(results["residual"][rows], expected.grad_residual) < 1e-12
        sums["weight"].append(expected.grad_weight)
        sums["bias"].append(expected.grad_bias)
    if weights != "none":
        for name, values in sums.items():
            each = torch.stack([torch.from_numpy(value.astype(float)) for value in values])
            total = each if weights == "GC" else each.sum(0)
            torch.testing.assert_close(by_autograd[name], total, **TIGHT)
            torch.testing.assert_close(by_op[name], total, **TIGHT)


def relabel(given: Named) -> dict[str, Any]:
    return {"x": given["input"], **{name: value for name, value in given.items() if name != "input"}}


@pytest.mark.parametrize("groups", [1, GROUPS, GROUPS * SAMPLES])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("residual", "masked"), list(itertools.product([False, True], repeat=2)), ids=str)
def test_primitives_composed_by_hand_are_the_whole(
    residual: bool, masked: bool, activation: str | None, groups: int
) -> None:
    given = draw("C", residual, masked, torch.float32)
    dy = torch.randn(SHAPE)
    x, weight, bias, r, mask = given.values()
    y, mean, var, count, saved = forward(given, groups, activation)

    m, m2, n = OPS.moments(x, mask, groups, BACKEND)
    torch.testing.assert_close(m, mean, **TIGHT)
    torch.testing.assert_close(m2 / n.clamp(min=1), var, **TIGHT)
    assert torch.equal(n, count)
    invstd = (m2 / n.clamp(min=1) + EPS).rsqrt()
    again, second = OPS.normalize(x, m, invstd, weight, bias, r, mask, activation, SLOPE, BACKEND)
    torch.testing.assert_close(again, y, rtol=3e-7, atol=1e-7)
    assert torch.equal(second, saved)

    keep = kept(given, saved, activation)
    tail = (weight, bias, keep, residual, mask)
    whole = OPS.backward(dy, x, mean, var, count, *tail, EPS, activation, SLOPE, BACKEND)
    sums = OPS.grad_sums(dy, x, m, invstd, *tail, activation, SLOPE, BACKEND)
    assert all(value.shape == (groups, CHANNELS) and value.dtype == torch.float64 for value in sums)
    dx, dr = OPS.grad_input(dy, x, m, invstd, *tail, *sums, n, activation, SLOPE, BACKEND)
    torch.testing.assert_close(dx, whole[0], rtol=3e-7, atol=1e-6)
    torch.testing.assert_close(sums[1].sum(0).float(), whole[1], rtol=3e-7, atol=1e-6)
    torch.testing.assert_close(sums[0].sum(0).float(), whole[2], rtol=3e-7, atol=1e-6)
    if residual:
        torch.testing.assert_close(dr, whole[3])


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "mask"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_moments_of_split_batches_merge_to_those_of_the_whole(dtype: torch.dtype, masked: bool) -> None:
    x = (torch.randn(11, 3, 4) * 2 + 50).to(dtype)
    mask = torch.rand(11, 4).mul(3).floor() if masked else None
    mean, m2, n = OPS.moments(x[:2], None if mask is None else mask[:2], 1, BACKEND)
    for rows in (slice(2, 3), slice(3, 8), slice(8, 11)):
        b_mean, b_m2, b_n = OPS.moments(x[rows], None if mask is None else mask[rows], 1, BACKEND)
        # Chan, Golub, LeVeque 1979
        total, delta = n + b_n, b_mean - mean
        m2 = m2 + b_m2 + delta**2 * n * b_n / total
        mean = mean + delta * b_n / total
        n = total
    whole = OPS.moments(x, mask, 1, BACKEND)
    for mine, expected in zip((mean, m2, n), whole, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def test_moments_of_groups_of_an_empty_batch() -> None:
    mean, m2, count = OPS.moments(torch.zeros(0, 3, 4), None, 1, BACKEND)
    assert mean.shape == m2.shape == (1, 3)
    assert (count == 0).all()
    assert (m2 == 0).all()


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("skip", [False, True])
def test_update_running(momentum: float | None, skip: bool) -> None:
    mean = torch.tensor([[1.0, float("nan"), 3.0]], dtype=torch.float64)
    var = torch.tensor([[1.0, 1.0, 4.0]], dtype=torch.float64)
    count = torch.full((1, 1), 5.0, dtype=torch.float64)
    running, tracked = (torch.zeros(3), torch.ones(3)), torch.tensor(4)
    OPS.update_running_(*running, tracked, mean, var, count, momentum, skip, BACKEND)
    factor = 0.25 if momentum is None else momentum
    assert tracked.item() == 4  # counted by the caller; read for the plain average
    torch.testing.assert_close(running[0][[0, 2]], torch.tensor([1.0, 3.0]) * factor)
    torch.testing.assert_close(running[1][[0, 2]], (1 - factor) + torch.tensor([1.0, 4.0]) * 1.25 * factor)
    assert running[0][1].isnan().item() is not skip


def samples() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of every operator, with and without what is optional."""
    calls: dict[str, list[tuple[Any, ...]]] = {name: [] for name in NAMES}
    for options, groups, activation, layout in (
        (("C", True, True), 1, "relu", "contiguous"),
        (("GC", True, False), GROUPS, "silu", "channels_last"),
        (("none", False, False), 1, None, "sliced"),
    ):
        given = draw(*options, torch.float32)
        given["input"] = lay_out(given["input"], layout)
        x, weight, bias, r, mask = given.values()
        end = (activation, SLOPE, BACKEND)
        _, mean, var, count, saved = forward(given, groups, activation)
        invstd, dy = (var + EPS).rsqrt(), torch.randn(SHAPE)
        tail = (weight, bias, kept(given, saved, activation), r is not None, mask)
        sums = OPS.grad_sums(dy, x, mean, invstd, *tail, *end)
        lx, lw, lb, lr = leaf(x.clone()), leaf(weight), leaf(bias), leaf(r)
        calls["forward"].append((lx, lw, lb, lr, mask, groups, EPS, *end))
        calls["backward"].append((dy, x, mean, var, count, *tail, EPS, *end))
        calls["moments"].append((x, mask, groups, BACKEND))
        calls["normalize"].append((lx, mean, invstd, lw, lb, lr, mask, *end))
        calls["normalize_by_batch"].append(
            (lx, mean, invstd, count, lw, lb, lr, mask, EPS, activation, SLOPE, None, BACKEND)
        )
        calls["grad_sums"].append((dy, x, mean, invstd, *tail, *end))
        calls["grad_input"].append((dy, x, mean, invstd, *tail, *sums, count, *end))
    one = torch.full((1, 2), 2.0, dtype=torch.float64)
    for tracked in (None, torch.tensor(1)):
        buffers = (torch.zeros(2), torch.ones(2), tracked)
        calls["update_running_"].append(
            (*buffers, one, one, torch.full((1, 1), 9.0).double(), 0.1, True, BACKEND)
        )
    return calls


NAMES = [
    "forward",
    "backward",
    "moments",
    "normalize",
    "normalize_by_batch",
    "grad_sums",
    "grad_input",
    "update_running_",
]


def test_these_are_all_the_operators() -> None:
    registered = torch._C._dispatch_get_all_op_names()
    assert sorted(name.split("::")[1] for name in registered if name.startswith("batchnorm::")) == sorted(
        NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    for arguments in samples()[name]:
        torch.library.opcheck(getattr(OPS, name).default, arguments)


def test_traced_eval_is_differentiable_by_its_inputs() -> None:
    x, mean, invstd = torch.randn(4, 2, 3), torch.randn(1, 2).double(), torch.rand(1, 2).double() + 1
    dy = torch.randn(4, 2, 3)
    a, weight, bias = leaf(x), leaf(torch.randn(2)), leaf(torch.randn(2))
    y, _ = OPS.normalize(a, mean, invstd, weight, bias, None, None, "gelu", SLOPE, BACKEND)
    expected = oracle(
        x, dy, weight=weight, bias=bias, activation="gelu", eps=0.0, running=(mean[0], invstd[0] ** -2)
    )
    gradients = torch.autograd.grad(y, [a, weight, bias], dy)
    for mine, truth in zip(
        (y, *gradients),
        (expected.output, expected.grad_input, expected.grad_weight, expected.grad_bias),
        strict=True,
    ):
        # float32 gelu is PyTorch's behind the kernels
        assert error(mine, truth) < (3e-7 if BACKEND == "reference" else 2e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("other", ["contiguous", "channels_last", "expanded"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "mask"])
def test_results_have_the_layout_that_tracing_expects(masked: bool, other: str, layout: str) -> None:
    x = lay_out(torch.randn(4, 3, 2, 5), layout)
    r, dy = (lay_out(torch.randn(4, 3, 2, 5), other) for _ in range(2))
    mask = torch.rand(4, 2, 5) < 0.7 if masked else None
    weight, bias = torch.randn(2, 3)
    for activation in (None, "relu", "silu"):
        end = (activation, SLOPE, BACKEND)
        y, mean, var, count, saved = OPS.forward(x, weight, bias, r, mask, 1, EPS, *end)
        tail = (weight, bias, r if activation == "silu" else saved, True, mask)
        dx, _, _, dr = OPS.backward(dy, x, mean, var, count, *tail, EPS, *end)
        invstd = (var + EPS).rsqrt()
        again, _ = OPS.normalize(x, mean, invstd, weight, bias, r, mask, *end)
        sums = OPS.grad_sums(dy, x, mean, invstd, *tail, *end)
        second = OPS.grad_input(dy, x, mean, invstd, *tail, *sums, count, *end)
        for value in (y, dx, dr, again, *second):
            assert value.stride() == torch.empty_like(x).stride()
