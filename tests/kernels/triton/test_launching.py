"""The two doors to a kernel and the memory of a reduction, with a kernel and a device that only take notes."""

import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

STREAM = 77


class OnDevice:
    """A tensor as a launch sees it."""

    def __init__(self, address: int, dtype: torch.dtype = torch.float32, device: int = 0) -> None:
        self.address, self.dtype, self.device = address, dtype, device

    def get_device(self) -> int:
        return self.device

    def data_ptr(self) -> int:
        return self.address


class Kernel:
    """A kernel as Triton offers it: [grid](arguments) compiles and starts it, and gives what it has compiled."""

    def __init__(self, run: Any = None) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.direct: list[tuple[Any, ...]] = []
        self.compiled = SimpleNamespace(
            run=run or (lambda *arguments: self.direct.append(arguments)),
            function=5,
            packed_metadata="packed",
        )

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def start(*arguments: Any, **options: Any) -> Any:
            self.asked.append((grid, arguments, options))
            return self.compiled

        return start


@pytest.fixture
def launching(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from batchnorm.kernels.triton import launching

    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    yield launching
    launching.Launch.direct = True


def launch_of(launching: Any, kernel: Kernel) -> Any:
    return launching.Launch(kernel, 12, (64, 3), (None, "relu"), 4, 128)


def test_the_first_launch_asks_triton_and_the_next_ones_do_not(launching: Any) -> None:
    kernel = Kernel()
    launch = launch_of(launching, kernel)
    tensors = (OnDevice(1024), None, OnDevice(4096, torch.int32))
    launch(tensors, (0.5,))
    grid, arguments, options = kernel.asked[0]
    assert (grid, arguments) == ((12, 1, 1), (*tensors, 0.5, 64, 3, None, "relu"))
    assert options["num_warps"] == 4
    assert options.get("maxnreg") == (128 if torch.version.hip is None else None)
    launch(tensors, (0.25,))
    assert len(kernel.asked) == 1
    expected = (12, 1, 1, STREAM, 5, "packed", None, None, None, 1024, 0, 4096, 0.25, 64, 3, None, "relu")
    assert kernel.direct == [expected]


@pytest.mark.parametrize(
    "other",
    [
        (OnDevice(1024, torch.float16), None),
        (OnDevice(1024, device=1), None),
        (OnDevice(1024), OnDevice(2048)),
        (OnDevice(1028), None),
    ],
    ids=["dtype", "device", "another argument", "address"],
)
def test_what_triton_has_not_compiled_for_goes_through_its_door(launching: Any, other: Any) -> None:
    kernel = Kernel()
    launch = launch_of(launching, kernel)
    launch((OnDevice(1024), None))
    launch(other)
    assert len(kernel.asked) == 2
    launch(other)
    launch((OnDevice(160), None))
    assert (len(kernel.asked), len(kernel.direct)) == (2, 2)


def test_a_profiler_sees_every_launch(launching: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    launch = launch_of(launching, kernel)
    launch((OnDevice(1024),))
    hook = SimpleNamespace(calls=[print])
    with monkeypatch.context() as patch:
        patch.setattr(launching.triton.knobs.runtime, "launch_enter_hook", hook)
        launch((OnDevice(1024),))
    assert (len(kernel.asked), len(kernel.direct)) == (2, 0)


def test_another_version_of_triton_is_asked_every_time(launching: Any) -> None:
    def refuses(*arguments: Any) -> None:
        raise TypeError("function takes exactly 3 arguments")

    kernel = Kernel(run=refuses)
    launch = launch_of(launching, kernel)
    for _ in range(3):
        launch((OnDevice(1024),))
    assert len(kernel.asked) == 3
    assert not launching.Launch.direct


def test_counters_are_handed_out_once(launching: Any) -> None:
    counters = launching._Counters(torch.zeros(2048, dtype=torch.int32))
    first, captured, other = counters.on(1, 10)[1], counters.cut(5), counters.on(2, 300)[1]
    assert counters.on(1, 200)[1] is first, "a stream keeps its own"
    parts = (first, captured, other)
    assert [part.numel() for part in parts] == [256, 5, 300]
    ranges = [range(part.storage_offset(), part.storage_offset() + part.numel()) for part in parts]
    assert len({index for part in ranges for index in part}) == 561
    assert all(part.storage_offset() % 4 == 0 for part in parts)
    assert counters.on(1, 700)[1].numel() == 700
    assert counters.cut(2000) is None, "the page is used up"


def test_a_stream_keeps_its_memory_and_a_captured_call_has_its_own(
    launching: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(launching, "_counters", {})

    def kept(partials: int = 100) -> Any:
        return launching._kept(torch.randn(3), partials, 4, torch.float32)

    assert kept() is None, "no page is made while a graph is captured"
    launching._counters[-1] = launching._Counters(torch.zeros(1024, dtype=torch.int32))
    captured, again = kept(), kept()
    capturing[0] = False
    eager = kept()
    assert len({scratch.counters.storage_offset() for scratch in (captured, again, eager)}) == 3
    assert len({scratch.partials.data_ptr() for scratch in (captured, again, eager)}) == 3
    assert kept(50).partials is eager.partials
    assert kept(50).counters is eager.counters
    large = kept(2 * launching._KEPT)
    assert kept(50).partials is eager.partials
    assert large.partials.numel() == 2 * launching._KEPT


def test_reductions_of_one_program_need_no_memory(launching: Any) -> None:
    assert launching.scratch_for(torch.randn(3), 0, 4, False, True) == (None, None)
    partials, counters = launching.scratch_for(torch.randn(3), 8, 4, True, True)
    assert (partials.dtype, partials.numel()) == (torch.float64, 8)
    assert counters.tolist() == [0, 0, 0, 0]
