"""What each backend can run, which one a call gets, and why: frozen data, tested without any device."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm import reference
from batchnorm._activations import activation_named
from batchnorm._errors import BackendError, InputError, InputTypeError, message
from batchnorm.kernels import cpu, triton
from batchnorm.kernels.cpu import launch
from batchnorm.kernels.triton.plan import bytes_of_bits

__all__ = [
    "BACKENDS",
    "COMPOSED",
    "Backend",
    "BackendChoice",
    "Call",
    "Candidate",
    "bits_of",
    "check_name",
    "choose",
    "explain_backend",
    "kernels_of",
]


class Call(NamedTuple):
    """All that the choice of a backend may depend on."""

    device: str
    dtype: torch.dtype
    training: bool
    activation: str | None = None
    residual: bool = False
    mask: bool = False
    groups: int = 1
    policy: bool = False


def _eighth(samples: int, channels: int, positions: int) -> int:
    return (samples * channels * positions + 7) // 8


@dataclass(frozen=True)
class Backend:
    """A name, what it refuses, and how exact it is, given whether the channel is the fastest axis.

    `module` holds the kernels, or is the name of the module, which is imported when it is first needed; aten has none
    of ours. `waits` says why a call that it could run goes to another one unless it is asked for by name. `bits` is
    the size in bytes of what it keeps of act′ for a shape (N, C, S).
    """

    name: str
    refuses: Callable[[Call], str | None]
    error: Callable[[Call, bool], str]
    module: ModuleType | str | None = None
    waits: Callable[[Call], str] = lambda call: ""
    bits: Callable[[int, int, int], int] = _eighth


@dataclass(frozen=True)
class Candidate:
    """One backend of a choice: `refused` says why it cannot run the call, None that it can; `note` its exactness.

    `waits` says why it runs only when it is asked for by name.
    """

    name: str
    refused: str | None
    note: str
    waits: str = ""


@dataclass(frozen=True)
class BackendChoice:
    """The backend that runs a call, and every candidate in order of preference."""

    chosen: str
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        lines = [f"backend: {self.chosen}"]
        for candidate in self.candidates:
            if candidate.refused is not None:
                state = f"cannot run this call: {candidate.refused}"
            elif candidate.name == self.chosen:
                state = f"chosen; {candidate.note}"
            elif candidate.waits:
                state = f"runs this call when asked for by name: {candidate.waits}; {candidate.note}"
            else:
                state = f"could run this call; {candidate.note}"
            lines.append(f"  {candidate.name}: {state}")
        return "\n".join(lines)


_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _cpu_refuses(call: Call) -> str | None:
    if call.device != "cpu":
        return f"its kernels run on the CPU, and the input is on {call.device}"
    if not cpu.available():
        return cpu.why_not()
    if call.dtype not in _FLOATS:
        return f"it has no kernels for {call.dtype}"
    return None


def _cpu_error(call: Call, rows: bool) -> str:
    exact = "exact to the rounding of the output: sums in float64, two float32 for the mean"
    if call.mask:
        exact = "exact to the rounding of the output: float64 arithmetic"
    if call.dtype == torch.float64:
        exact = "exact to some 1e-15 of the largest value: float64 throughout"
    return exact if call.training else f"{exact}; traced and exported calls in eval take aten"


# Set it to True when `make test-gpu` and the benchmark have been run on a GPU, and say so in CHANGELOG.md.
_RUN_ON_A_GPU = False


def _triton_refuses(call: Call) -> str | None:
    if call.dtype not in _FLOATS:
        return f"it has no kernels for {call.dtype}"
    return triton.why_not(call.device, call.dtype) or None


def _triton_waits(call: Call) -> str:
    if call.device == "cpu":
        return "triton's interpreter is there for tests"
    if not _RUN_ON_A_GPU:
        return (
            "its kernels have passed their tests in triton's interpreter and have not been run on a GPU yet"
        )
    return ""


def _triton_error(call: Call, rows: bool) -> str:
    if call.dtype == torch.float64:
        return "exact to some 1e-15 of the largest value: float64 throughout"
    return "within 1e-6 of the largest value: float32 sums about a pilot, two float32 for the mean"


def _aten_refuses(call: Call) -> str | None:
    if call.training and call.mask:
        return "PyTorch's batch norm has no mask"
    if call.groups != 1:
        return "PyTorch's batch norm has no groups"
    if call.policy:
        return "PyTorch's batch norm knows no statistics but its own"
    return None


def _aten_error(call: Call, rows: bool) -> str:
    if not call.training:
        return "y = a·x + b with b = bias − mean·a, which cancels where |mean| is far above σ"
    if call.device != "cpu":
        return "float32 statistics"
    if call.dtype == torch.float64:
        return "float64 throughout; y = a·x + b cancels where |mean| is far above σ"
    # Measured against float64: N(100, 1) with 10⁷ rows; a constant channel of 100.1 in 100 rows and in 10⁶ positions.
    if rows:
        return "sums in float32: with 10⁷ rows of N(100, 1) y is off by 4.5, with 100 rows of a constant 100.1 by 0.017"
    return "sums in float64, but y = a·x + b: a constant channel of 100.1 gives 9e-4 instead of 0"


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("cpu", _cpu_refuses, _cpu_error, launch),
        Backend(
            "triton",
            _triton_refuses,
            _triton_error,
            "batchnorm.kernels.triton.launch",
            _triton_waits,
            # The larger of both memory orders, because a compiler may choose another one than it was told of.
            lambda samples, channels, positions: torch.sym_max(*bytes_of_bits(samples, channels, positions)),
        ),
        Backend("aten", _aten_refuses, _aten_error),
        Backend(
            "reference",
            lambda call: None,
            lambda call, rows: (
                "float32 arithmetic: the device has no float64"
                if call.device == "mps"
                else "exact: float64 arithmetic, rounded once"
            ),
            reference,
        ),
    )
}


# The backends whose modules also have `train_forward`, `train_backward` and `eval_forward`: a direction in one call.
COMPOSED = ("cpu", "triton")

_modules: dict[str, ModuleType] = {}


def kernels_of(backend: str) -> ModuleType:
    """The module that holds a backend's kernels."""
    module = _modules.get(backend)
    if module is None:
        named = BACKENDS[backend].module
        if named is None:
            raise BackendError(message("kernels", got=backend, expected="a backend with kernels of its own"))
        module = _modules[backend] = importlib.import_module(named) if isinstance(named, str) else named
    return module


def bits_of(backend: str, input: Tensor) -> int:
    """The bytes that hold the bits of act′ for an input, as its backend packs them."""
    return BACKENDS[backend].bits(input.shape[0], input.shape[1], input.shape[2:].numel())


def check_name(backend: str | None) -> None:
    """Refuse the name of a backend that does not exist."""
    if backend is not None and backend not in BACKENDS:
        raise InputError(
            message("backend", got=repr(backend), expected=f"None or one of {', '.join(BACKENDS)}")
        )


_chosen: dict[tuple[object, ...], str] = {}


def choose(
    input: Tensor,
    training: bool,
    activation: str | None,
    residual: bool,
    mask: bool,
    policy: bool,
    backend: str | None,
    traced: bool = False,
) -> str:
    """The name of the backend that runs a call: the one asked for, or the first that does not refuse.

    Eval mode that is `traced` goes to aten, so that exported programs hold no operator of ours.
    """
    device, dtype = input.device, input.dtype
    if torch.compiler.is_compiling():
        call = Call(device.type, dtype, training, activation, residual, mask, 1, policy)
        return _choose(call, backend, traced)
    # Kept: there are some dozen kinds of call, and asking costs 1.5 µs. Not by lru_cache: the compiler warns of it.
    key = (device, dtype, training, activation, residual, mask, policy, backend, traced)
    name = _chosen.get(key)
    if name is None:
        call = Call(device.type, dtype, training, activation, residual, mask, 1, policy)
        name = _chosen[key] = _choose(call, backend, traced)
    return name


def _choose(call: Call, backend: str | None, traced: bool) -> str:
    if backend is None:
        if traced and not call.training and call.groups == 1:
            return "aten"
        return next(
            name
            for name, candidate in BACKENDS.items()
            if candidate.refuses(call) is None and not candidate.waits(call)
        )
    if backend not in BACKENDS:
        raise InputError(
            message("backend", got=repr(backend), expected=f"None or one of {', '.join(BACKENDS)}")
        )
    reason = BACKENDS[backend].refuses(call)
    if reason is not None:
        raise BackendError(
            message(
                f"backend {backend!r} cannot run this call",
                got=reason,
                expected="a call that it supports",
                fix="Leave backend=None, or ask batchnorm.explain_backend which backends can.",
            )
        )
    return backend


def explain_backend(
    input: Tensor,
    *,
    training: bool = True,
    activation: str | None = None,
    residual: Tensor | bool | None = None,
    mask: Tensor | bool | None = None,
) -> BackendChoice:
    """Say which backend runs batch norm on `input`, why each other does not, and how exact each one is.

    Args:
        input: a tensor of shape (N, C, *S); only its device, dtype and layout are looked at.
        training: statistics of the batch (True) or running statistics (False).
        activation: the fused activation's name, or None.
        residual: the tensor that is added before the activation, or whether there is one.
        mask: the mask, or whether there is one.

    Raises:
        InputError: if `activation` is not one of the known ones.
        InputTypeError: if `input` is no tensor.

    Example:
        >>> import torch, batchnorm
        >>> choice = batchnorm.explain_backend(torch.randn(8, 3), mask=torch.ones(8))
        >>> {candidate.name: candidate.refused for candidate in choice.candidates}["aten"]
        "PyTorch's batch norm has no mask"
    """
    if not isinstance(input, Tensor):
        raise InputTypeError(message("input", got=type(input).__name__, expected="a torch.Tensor"))
    activation_named(activation)
    call = Call(
        input.device.type,
        input.dtype,
        training,
        activation,
        residual is not None and residual is not False,
        mask is not None and mask is not False,
    )
    rows = input.dim() < 3 or input.stride(1) == 1
    return BackendChoice(
        chosen=_choose(call, None, False),
        candidates=tuple(
            Candidate(backend.name, backend.refuses(call), backend.error(call, rows), backend.waits(call))
            for backend in BACKENDS.values()
        ),
    )
