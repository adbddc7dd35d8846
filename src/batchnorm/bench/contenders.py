"""Who is timed on a case: our layer, PyTorch's layer with its functions behind it, that compiled, cuDNN's graph."""

import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import nn as ours
from batchnorm.bench.case import OPERATIONS, Case
from batchnorm.bench.cudnn_graphs import CudnnNorm, why_not
from batchnorm.bench.suites import EPILOGUES
from batchnorm.ops import explain_backend

__all__ = [
    "Contender",
    "Inputs",
    "backend_of",
    "compiled",
    "eager",
    "gradients",
    "inputs",
    "operation",
    "our_layer",
    "reset_statistics",
    "rival",
    "synchronized",
]

_FUNCTIONS = {"relu": torch.relu, "relu6": nn.functional.relu6}


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case; the same for everyone who is timed on it."""

    x: Tensor
    dy: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor


@dataclass(frozen=True)
class Contender:
    """What is timed, the layer inside, and why it cannot do some of the operations."""

    function: Callable[..., Tensor]
    layer: nn.Module
    lacks: dict[str, str] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The operations that it can do."""
        return tuple(task for task in OPERATIONS if task not in self.lacks)


class _Eager(nn.Module):
    """What a user of torch writes: the layer, an addition, a function."""

    def __init__(self, norm: nn.Module, epilogue: str) -> None:
        super().__init__()
        self.norm = norm
        self.function = _FUNCTIONS.get(EPILOGUES[epilogue].activation or "")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """y = act(bn(x) + residual)."""
        y: Tensor = self.norm(x)
        if residual is not None:
            y = y + residual
        return y if self.function is None else self.function(y)


def inputs(case: Case) -> Inputs:
    """Random numbers in the case's layout: channels that differ in mean and spread, and a random gradient."""
    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    generator = torch.Generator(device).manual_seed(0)
    channels = case.shape[1]
    # As autocast has it: parameters and statistics of a half type's layer are float32.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    column = (1, channels, *(1 for _ in case.shape[2:]))

    def normal(*shape: int, of: torch.dtype = wide) -> Tensor:
        return torch.randn(shape, device=device, dtype=of, generator=generator)

    x = normal(*case.shape, of=dtype)
    x.mul_(normal(channels).mul_(0.2).exp_().view(column)).add_(normal(channels).mul_(0.5).view(column))
    residual = _laid_out(normal(*case.shape, of=dtype), case) if EPILOGUES[case.epilogue].residual else None
    return Inputs(
        x=_laid_out(x, case).requires_grad_(),
        dy=_laid_out(normal(*case.shape, of=dtype), case),
        residual=None if residual is None else residual.requires_grad_(),
        weight=normal(channels).mul_(0.2).add_(1),
        bias=normal(channels).mul_(0.2),
        running_mean=normal(channels).mul_(0.5),
        running_var=normal(channels).mul_(0.2).exp_(),
    )


def _laid_out(x: Tensor, case: Case) -> Tensor:
    if case.layout != "channels-last":
        return x
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.contiguous(memory_format=last)


def our_layer(case: Case, given: Inputs) -> nn.Module:
    """The layer of this package, with the activation in it."""
    kind = {2: ours.BatchNorm1d, 4: ours.BatchNorm2d, 5: ours.BatchNorm3d}[len(case.shape)]
    layer = kind(
        case.shape[1],
        activation=EPILOGUES[case.epilogue].activation,
        backend=case.backend,
        device=given.weight.device,
        dtype=given.weight.dtype,
    )
    return _loaded(layer, given)


def eager(case: Case, given: Inputs) -> nn.Module:
    """PyTorch's layer, and its functions behind it."""
    return _Eager(_torchs(case, given), case.epilogue)


def _torchs(case: Case, given: Inputs) -> _BatchNorm:
    kind = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(case.shape)]
    layer = kind(case.shape[1], device=given.weight.device, dtype=given.weight.dtype)
    _loaded(layer, given)
    return layer


def synchronized(
    case: Case, given: Inputs, kind: type[ours.SyncBatchNorm] | type[nn.SyncBatchNorm]
) -> nn.Module:
    """A layer over all processes: ours with the activation in it, PyTorch's with its functions behind it."""
    channels, device, dtype = case.shape[1], given.weight.device, given.weight.dtype
    if issubclass(kind, ours.SyncBatchNorm):
        activation = EPILOGUES[case.epilogue].activation
        layer = kind(channels, activation=activation, backend=case.backend, device=device, dtype=dtype)
        return _loaded(layer, given)
    return _Eager(_loaded(kind(channels, device=device, dtype=dtype), given), case.epilogue)


def compiled(case: Case, given: Inputs) -> tuple[Callable[..., Tensor], nn.Module]:
    """The same under torch.compile, compiled and run once for each operation; and the layer inside.

    Raises:
        RuntimeError: it cannot be compiled here; the message says why.
    """
    if given.x.device.type == "cpu" and not _has_compiler():
        raise RuntimeError("torch.compile needs a C++ compiler on the CPU, and none is installed")
    torch._dynamo.reset()
    layer = eager(case, given)
    function: Callable[..., Tensor] = torch.compile(layer, dynamic=False)
    try:
        for name in ("forward+backward", "inference"):
            operation(name, function, layer, given)()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(f"torch.compile failed: {reason}") from error
    return function, layer


def rival(name: str, case: Case, given: Inputs) -> Contender:
    """One of those whom our layer is compared with.

    Raises:
        RuntimeError: it cannot run here; the message says why.
    """
    if name == "compile":
        return Contender(*compiled(case, given))
    if name == "cudnn":
        return _cudnn(case, given)
    layer = eager(case, given)
    return Contender(layer, layer)


def _cudnn(case: Case, given: Inputs) -> Contender:
    """cuDNN's graphs, each run once."""
    reason = why_not(case)
    if reason:
        raise RuntimeError(reason)
    layer = CudnnNorm(_torchs(case, given), case, given.x)
    for task in OPERATIONS:
        if task not in layer.lacks:
            try:
                operation(task, layer, layer, given)()
                if given.x.is_cuda:
                    torch.cuda.synchronize()
            except Exception as error:
                layer.lacks[task] = (
                    f"cuDNN's graph failed: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
                )
    if len(layer.lacks) == len(OPERATIONS):
        raise RuntimeError(layer.lacks["forward"])
    return Contender(layer, layer, layer.lacks)


def _has_compiler() -> bool:
    named = str(sysconfig.get_config_var("CXX") or "").split()[:1]
    return any(shutil.which(name) for name in (*named, "g++", "c++", "clang++"))


def _loaded(layer: nn.Module, given: Inputs) -> nn.Module:
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(layer, name).copy_(getattr(given, name))
    return layer


def reset_statistics(layer: nn.Module, given: Inputs) -> None:
    """Undo what training steps have done to the running statistics."""
    for name, buffer in layer.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(getattr(given, name.rpartition(".")[2]))


def operation(
    name: str, function: Callable[..., Tensor], layer: nn.Module, given: Inputs
) -> Callable[[], object]:
    """One operation as a function of nothing; it puts the layer into the mode that it needs."""
    layer.train(name != "inference")
    x, residual = given.x, given.residual
    if name == "inference":

        def infer() -> object:
            with torch.inference_mode():
                return function(x, residual)

        return infer
    if name == "forward":
        return lambda: function(x, residual)
    return lambda: gradients(function, layer, given)


def gradients(function: Callable[..., Tensor], layer: nn.Module, given: Inputs) -> tuple[Tensor, ...]:
    """y, dx, dweight, dbias and, where there is a residual, its gradient."""
    y = function(given.x, given.residual)
    wanted = [given.x, *layer.parameters(), *(() if given.residual is None else (given.residual,))]
    return y, *torch.autograd.grad(y, wanted, given.dy)


def backend_of(case: Case, given: Inputs, *, training: bool) -> str:
    """Which backend runs our layer."""
    if case.backend is not None:
        return case.backend
    choice = explain_backend(
        given.x,
        training=training,
        activation=EPILOGUES[case.epilogue].activation,
        residual=given.residual,
    )
    return choice.chosen
