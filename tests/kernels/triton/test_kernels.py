"""The Triton kernels against the reference in float64: every function, dtype, layout, activation, residual and mask."""

from typing import Any

import pytest
import torch
from helpers import ACTIVATIONS, SLOPE, same_bits
from torch import Tensor
from triton_helpers import DEVICE, EPS, ROOM, Data, agree, kept_of, marks, near

from batchnorm import reference
from batchnorm.kernels.triton import tensors
from batchnorm.kernels.triton.plan import Machine

pytestmark = marks  # with pytest.mark.gpu where there is a GPU

# Interpreted, a launch takes some 0.1 s: what is marked so runs in `make test-all`, and on a GPU.
slow = () if DEVICE == "cuda" else pytest.mark.slow

# Sizes that leave a rest everywhere: rows and planes, one channel, more channels than a tile (16 if interpreted), more
# pieces than a program, tiles of 256 elements.
SHAPES = [
    (7, 3), (40, 20), (5, 1), (9, 33), (3, 5, 7), (2, 17, 33), (3, 2, 5, 9), (2, 1, 70), (2, 3, 3, 4, 5), (1, 2, 300),
]  # fmt: skip


@pytest.fixture(scope="module")
def launch() -> Any:
    from batchnorm.kernels.triton import launch

    return launch


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        pytest.param(shape, layout, marks=() if (at + later) % 3 == 0 else slow)
        for at, shape in enumerate(SHAPES)
        for later, layout in enumerate(["contiguous", "channels_last"])
    ],
    ids=str,
)
def test_every_shape(launch: Any, shape: tuple[int, ...], layout: str) -> None:
    agree(launch, Data(shape, layout=layout, residual=True), "relu", ROOM[torch.float32], primitives=False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("mask", [None, pytest.param("bool", marks=slow)])
def test_every_activation(launch: Any, activation: str | None, residual: bool, mask: str | None) -> None:
    layout = "channels_last" if residual == (mask is None) else "contiguous"
    data = Data((3, 3, 7), layout=layout, residual=residual, mask=mask)
    data.weight *= 2  # relu6 and hardswish have kinks at 6 and ±3
    agree(launch, data, activation, ROOM[torch.float32], primitives=False)


@pytest.mark.parametrize("mask", [None, "weights"])
@pytest.mark.parametrize("layout", ["contiguous", pytest.param("channels_last", marks=slow)])
@pytest.mark.parametrize(
    ("activation", "residual"), [("relu", True), pytest.param(None, False, marks=slow), ("silu", True)]
)
def test_primitives(
    launch: Any, activation: str | None, residual: bool, layout: str, mask: str | None
) -> None:
    agree(launch, Data((4, 3, 8), layout=layout, residual=residual, mask=mask), activation, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "layout", ["channels_last", pytest.param("contiguous", marks=slow), pytest.param("sliced", marks=slow)]
)
def test_every_dtype(launch: Any, dtype: torch.dtype, layout: str) -> None:
    agree(launch, Data((3, 5, 4, 2), dtype, layout, residual=True), "silu", ROOM[dtype], primitives=False)


@pytest.mark.parametrize("layout", ["contiguous", pytest.param("channels_last", marks=slow)])
@pytest.mark.parametrize("own", [pytest.param(False, marks=slow), True], ids=["shared", "own"])
@pytest.mark.parametrize(("groups", "mask"), [(2, None), pytest.param(6, "bool", marks=slow)])
def test_groups(launch: Any, groups: int, mask: str | None, own: bool, layout: str) -> None:
    parameters = (groups, 5) if own else None
    data = Data((6, 5, 8), layout=layout, residual=True, mask=mask, parameters=parameters)
    agree(launch, data, "leaky_relu", ROOM[torch.float32], groups)


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=slow) for dtype in ROOM], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("mask", [None, "bool", "frequencies", "weights"])
def test_everything(
    launch: Any, mask: str | None, residual: bool, activation: str | None, dtype: torch.dtype
) -> None:
    for shape, layout in (((23, 6), "contiguous"), ((3, 5, 21), "contiguous"), ((3, 9, 7), "channels_last")):
        agree(launch, Data(shape, dtype, layout, residual, mask), activation, ROOM[dtype])


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=slow) for name in ("contiguous", "channels_last", "sliced", "expanded")],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_masked_and_in_groups(launch: Any, shape: tuple[int, ...], layout: str) -> None:
    # An expanded input has the NaN of its first sample where the other samples' masks have none.
    mask = None if layout == "expanded" else "weights"
    agree(launch, Data(shape, layout=layout, residual=True, mask=mask), "relu6", ROOM[torch.float32])
    if shape[0] > 1 and torch.Size(shape[2:]).numel() > 1:
        agree(launch, Data(shape, torch.float64, layout), "gelu", ROOM[torch.float64], groups=shape[0])


@pytest.mark.parametrize("layout", ["contiguous", pytest.param("channels_last", marks=slow)])
def test_tiles_as_large_as_on_a_gpu(launch: Any, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tensors._machines, torch.device("cpu"), Machine(multiprocessors=2))
    agree(launch, Data((5, 70, 7, 8), layout=layout, residual=True), "relu", 1e-6, primitives=False)


def step(launch: Any, data: Data, activation: str | None, groups: int = 1) -> tuple[Tensor, ...]:
    y, mean, var, count, saved = launch.forward(*data.call(), data.mask, groups, EPS, activation, SLOPE)
    gradients = launch.backward(
        data.dy, data.x, mean, var, count, data.weight, data.bias, kept_of(saved, data.r, activation),
        data.r is not None, data.mask, EPS, activation, SLOPE,
    )  # fmt: skip
    return (y, mean, var, *gradients)


def test_a_nan_stays_in_its_channel(launch: Any) -> None:
    for layout, bad in (("contiguous", float("inf")), ("channels_last", float("nan"))):
        data = Data((4, 18, 4), layout=layout)
        before = step(launch, data, None)
        data.x[1, 17, 3] = bad
        data.dy[2, 3, 1] = bad
        after = step(launch, data, None)
        clean = [c for c in range(18) if c not in (3, 17)]
        for old, new in zip(before[:6], after[:6], strict=True):
            axis = 1 if old.dim() > 1 else 0
            index = torch.tensor(clean, device=DEVICE)
            assert same_bits(old.index_select(axis, index), new.index_select(axis, index))
        assert same_bits(before[0][:, 3], after[0][:, 3])
        assert not after[1][0, 17].isfinite()
        assert after[0][:, 17].isnan().any()
        assert after[3][:, 3].isnan().any()


def test_running_to_the_end_leaves_the_counters_at_zero_and_the_same_bits(
    launch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    zeros = torch.zeros

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        made.append(zeros(*args, **kwargs))
        return made[-1]

    data = Data((70, 17), residual=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", noted)
        first = step(launch, data, "relu")
    assert len(made) == 2
    assert all(
        (counters.dtype == torch.int32 and counters.numel() > 1) or DEVICE == "cuda" for counters in made
    )
    assert not any(counters.any() for counters in made)
    assert all(map(same_bits, first, step(launch, data, "relu")))


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (4, 3, 0), (4, 0, 3)], ids=str)
def test_nothing_in_nothing_out(launch: Any, shape: tuple[int, ...]) -> None:
    data = Data(shape, residual=True)
    for mask in (None, torch.ones(shape[0], *shape[2:], device=DEVICE)):
        if shape[1] == 0:
            continue  # the reference has no such weight
        truth = reference.forward(*data.call(True), mask, 1, EPS, "relu", SLOPE)
        found = launch.forward(*data.call(), mask, 1, EPS, "relu", SLOPE)
        for mine, other in zip(found[:4], truth[:4], strict=True):
            near(mine, other, 0)
        assert found[4].numel() == 0
        y, *gradients = step(launch, data, "relu")[0::3]
        assert y.shape == gradients[0].shape == shape
    assert launch.moments(data.x, None, 1)[0].shape == (1, shape[1])
    y, _, statistics = launch.train_forward(*data.call(), None, EPS, "relu", SLOPE)
    assert y.shape == shape
    gradients = launch.train_backward(
        data.dy, data.x, statistics, data.weight, data.bias, None, True, EPS, "relu", SLOPE
    )
    assert gradients[0].shape == shape
    assert not gradients[1].any()


@pytest.mark.parametrize(
    ("before", "after"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_a_residual_of_another_dtype_and_layout(launch: Any, before: torch.dtype, after: torch.dtype) -> None:
    for activation in ("relu", "hardswish"):
        data = Data((2, 4, 9), before, "channels_last")
        data.r = torch.randn(2, 4, 9).to(DEVICE, after)
        mine = step(launch, data, activation)
        truth = reference.forward(*data.call(True), None, 1, EPS, activation, SLOPE)
        near(mine[0], truth[0], ROOM[before])
        assert mine[0].dtype == mine[3].dtype == mine[6].dtype == before
