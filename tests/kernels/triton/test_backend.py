"""When the Triton kernels are chosen and why not: frozen data, asked without any device."""

import importlib.util
from typing import Any

import pytest
import torch

import batchnorm
from batchnorm.bench import plan
from batchnorm.kernels import triton
from batchnorm.ops import backends
from batchnorm.ops.backends import Call

ENTRY = backends.BACKENDS["triton"]
FLOAT = Call("cuda", torch.float32, True, "relu", True)


@pytest.fixture
def _with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "installed", lambda: True)


@pytest.fixture
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_RUN_ON_A_GPU", True)


@pytest.mark.usefixtures("_with_triton")
def test_it_waits_until_it_has_run_on_a_gpu() -> None:
    assert ENTRY.refuses(FLOAT) is None
    assert "not been run on a GPU" in ENTRY.waits(FLOAT)
    assert backends._choose(FLOAT, None, False) == "aten"
    assert backends._choose(FLOAT, "triton", False) == "triton"


@pytest.mark.usefixtures("_with_triton", "_on_a_gpu")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_then_it_is_the_first_choice(
    dtype: torch.dtype, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for mask, groups in ((False, 1), (True, 1), (False, 4)):
        call = Call("cuda", dtype, training, "silu", True, mask, groups)
        assert ENTRY.waits(call) == ""
        assert backends._choose(call, None, False) == "triton"
    # What is exported holds no operator of ours.
    assert backends._choose(Call("cuda", dtype, False), None, traced=True) == "aten"


@pytest.mark.usefixtures("_on_a_gpu")
def test_the_interpreter_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backends.cpu, "available", lambda: False)
    call = Call("cpu", torch.float32, True)
    assert backends._choose(call, None, False) == "aten"
    assert "tests" in ENTRY.waits(call)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (Call("cpu", torch.float32, True), "the input is on cpu"),
        (Call("mps", torch.float32, True), "the input is on mps"),
        (Call("cuda", torch.float8_e4m3fn, True), "no kernels for torch.float8_e4m3fn"),
    ],
)
def test_refusals(call: Call, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert reason in (ENTRY.refuses(call) or "")


def test_it_says_that_triton_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in (ENTRY.refuses(FLOAT) or "")
    assert backends._choose(FLOAT, None, False) == "aten"


@pytest.mark.usefixtures("_with_triton")
@pytest.mark.parametrize(
    ("capability", "dtype", "refused"),
    [
        ((6, 1), torch.float32, True),
        ((7, 5), torch.float16, False),
        ((7, 5), torch.bfloat16, True),
        ((9, 0), torch.bfloat16, False),
    ],
)
def test_old_devices(
    capability: tuple[int, int], dtype: torch.dtype, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    reason = ENTRY.refuses(Call("cuda", dtype, True))
    assert (reason is not None) == refused
    assert reason is None or f"{capability[0]}.{capability[1]}" in reason


def test_asked_for_by_name_it_runs_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(batchnorm.BackendError, match="its kernels run on GPUs"):
        batchnorm.BatchNorm1d(3, backend="triton")(torch.randn(4, 3))


def test_explain_names_it_and_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "installed", lambda: True)
    choice = batchnorm.explain_backend(torch.randn(4, 3))
    found = {candidate.name: candidate for candidate in choice.candidates}["triton"]
    assert found.refused is None
    assert found.waits
    assert f"runs this call when asked for by name: {found.waits}; within 1e-6" in str(choice)


def test_the_benchmark_knows_every_backend() -> None:
    assert set(plan.BACKENDS) == set(backends.BACKENDS)


@pytest.mark.parametrize("shape", [(4, 6), (3, 5, 7, 9), (2, 1, 40)], ids=str)
def test_the_fake_bits_are_as_many_as_the_kernels_keep(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    from batchnorm.kernels.triton import tensors

    room: Any = tensors.room_for_bits(x, x, "relu")
    assert room.numel() == backends.bits_of("triton", x)
    assert tensors.room_for_bits(x, x, "gelu") is None
