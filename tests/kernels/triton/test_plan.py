"""The plans of the GPU kernels: pure numbers, for any shape, without triton and without a GPU."""

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from batchnorm.kernels.triton.plan import (
    FEWEST,
    MOST,
    Layout,
    Machine,
    Plan,
    Reduction,
    Sweep,
    bytes_of_bits,
    layout_of,
    plan_of,
)

H100 = Machine(multiprocessors=132)
GRID = 2**31 - 1

# Channels and the side of the image of the batch norms of ResNet-50.
RESNET = [
    (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14), (512, 14),
    (512, 7), (2048, 7),
]  # fmt: skip
EXTREMES = {
    "one channel": Layout(10**8, 1, 1, False),
    "one channel of images": Layout(128, 1, 224 * 224, False),
    "many channels": Layout(12, 10**5, 1, True),
    "many channels, few positions": Layout(3, 10**5, 2, False),
    "two channels": Layout(10**7, 2, 1, True),
    "one row": Layout(1, 64, 1, True),
    "one plane": Layout(1, 1, 2, False),
    "more than 2³¹ rows": Layout(2**31 + 5, 3, 1, True),
    "more than 2³¹ positions": Layout(1, 2, 2**31 + 5, False),
    "more than 2³¹ elements": Layout(2**20, 64, 64, True),
    "tiny images": Layout(10**6, 3, 4, False),
}


def kernels(plan: Plan) -> tuple[tuple[Reduction, Reduction], tuple[Sweep, Sweep]]:
    return (plan.moments, plan.grad_sums), (plan.normalize, plan.grad_input)


def check(layout: Layout, groups: int, plan: Plan) -> None:
    """Every element of every group lies in exactly one piece, and everything fits."""
    view = plan.view
    assert view.groups * view.samples * view.positions == layout.samples * layout.positions
    assert view.channels == layout.channels
    assert view.groups == groups
    fastest = view.channels if view.last else view.positions
    assert fastest % plan.align == 0
    reductions, sweeps = kernels(plan)
    for part in (*reductions, *sweeps):
        tile = part.tile
        for size in (tile.positions, tile.channels, tile.warps):
            assert size & (size - 1) == 0
            assert size >= 1
        assert tile.positions * tile.channels <= 4096
        assert (tile.channels if view.last else tile.positions) % 8 == 0, "the bits of a row make whole bytes"
        assert tile.channels * part.blocks >= view.channels > tile.channels * (part.blocks - 1)
        assert 1 <= part.programs <= GRID
        assert tile.warps <= 8
    for part in reductions:
        runs = -(-view.positions // part.tile.positions)
        assert part.pieces == view.samples * runs
        assert (part.splits - 1) * part.per < part.pieces <= part.splits * part.per
        assert part.per <= MOST, "so many float32 are added one after the other"
        assert part.splits <= -(-part.pieces // FEWEST) or part.per == MOST
        assert part.programs == groups * part.blocks * part.splits
    for sweep in sweeps:
        assert sweep.runs == -(-view.positions // sweep.tile.positions)
        assert sweep.programs == groups * view.samples * sweep.blocks * sweep.runs


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize(("channels", "side"), RESNET)
@pytest.mark.parametrize("batch", [32, 128, 256])
def test_resnet_50(batch: int, channels: int, side: int, last: bool) -> None:
    layout = Layout(batch, channels, side * side, last)
    plan = plan_of(layout, 1, False, H100)
    check(layout, 1, plan)
    forward, backward = plan.moments, plan.grad_sums
    # What was measured: 64 rows of 64 channels, 16 warps a multiprocessor.
    if last:
        assert forward.tile == (64, 64, 4)
        assert backward.tile == (64, 64, 8)
    assert forward.tile.positions * forward.tile.channels == (4096 if plan.align >= 4 else 2048)
    assert forward.programs <= 4 * 132 + forward.blocks
    assert backward.programs <= 2 * 132 + backward.blocks
    # Every multiprocessor has work, where there is enough of it.
    assert forward.programs >= min(132, forward.blocks * forward.pieces // 4)


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("wide", [False, True])
def test_extremes(name: str, wide: bool) -> None:
    layout = EXTREMES[name]
    check(layout, 1, plan_of(layout, 1, wide, H100))


def test_grids_have_one_axis_which_may_be_longer_than_65535() -> None:
    plan = plan_of(EXTREMES["more than 2³¹ elements"], 1, False, H100)
    assert plan.normalize.programs > 65_535
    plan = plan_of(Layout(70_000, 64, 16, False), 70_000, False, H100)
    assert plan.moments.programs > 65_535


@given(
    samples=st.integers(1, 10**6),
    channels=st.integers(1, 10**5),
    positions=st.integers(1, 10**6),
    groups=st.integers(1, 64),
    last=st.booleans(),
    wide=st.booleans(),
    multiprocessors=st.sampled_from([1, 16, 108, 132, 304]),
)
def test_any_shape(
    samples: int, channels: int, positions: int, groups: int, last: bool, wide: bool, multiprocessors: int
) -> None:
    assume(samples * channels * positions * groups < 2**40)
    layout = Layout(samples * groups, channels, positions, last and channels > 1)
    check(layout, groups, plan_of(layout, groups, wide, Machine(multiprocessors)))


def test_small_tiles_do_not_starve_the_machine() -> None:
    plan = plan_of(EXTREMES["tiny images"], 1, False, H100)
    assert plan.moments.tile.warps == 1
    assert plan.moments.programs * plan.moments.tile.warps >= 16 * 132


def test_at_most_a_quarter_of_the_lanes_is_idle_where_a_block_allows_it() -> None:
    for length in range(8, 300):
        tile = plan_of(Layout(64, length, 1, True), 1, False, H100).normalize.tile
        blocks = -(-length // tile.channels)
        idle = 1 - length / (blocks * tile.channels)
        smallest = 1 - length / (-(-length // 8) * 8)
        assert idle <= max(0.25, smallest)


@pytest.mark.parametrize("dims", [2, 3, 4, 5])
def test_layouts_are_those_of_the_tensors(dims: int) -> None:
    for shape in itertools.product([1, 2, 3], repeat=dims):
        x = torch.arange(torch.Size(shape).numel()).view(shape)
        rows = x.movedim(1, -1).contiguous().movedim(-1, 1)
        positions = x.shape[2:].numel()
        for tensor, order in ((x, (0, 1, *range(2, dims))), (rows, (0, *range(2, dims), 1))):
            layout = layout_of(tensor.shape, tensor.stride())
            assert layout is not None
            assert layout[:3] == (shape[0], shape[1], positions)
            # The order that it names is that of the memory, whatever sizes of 1 there are.
            named = (0, *range(2, dims), 1) if layout.last else tuple(range(dims))
            assert tensor.permute(named).is_contiguous()
            assert tensor.permute(order).is_contiguous()
    assert layout_of((4, 3, 5), (60, 1, 12)) is None
    assert layout_of((4, 3), (0, 1)) is None


def test_bits_have_room_in_both_orders() -> None:
    assert bytes_of_bits(2, 8, 16) == (32, 32)
    assert bytes_of_bits(3, 5, 7) == (21, 15)


def test_plans_need_neither_triton_nor_torch() -> None:
    code = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("plan", sys.argv[1])
plan = sys.modules["plan"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plan)
plan.plan_of(plan.layout_of((8, 3, 5, 5), (75, 25, 5, 1)), 2, False, plan.Machine(4))
assert not {"torch", "triton"} & set(sys.modules)
"""
    subprocess.run(
        [sys.executable, "-c", code, sys.modules[Plan.__module__].__file__ or ""], check=True, timeout=60
    )
