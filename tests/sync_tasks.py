"""What the processes of layers/test_sync_check.py and test_sync_compile.py do; see sync_worker.py."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from sync_cases import CHANNELS, Case, gathering
from torch import Tensor, nn

import batchnorm

# Seconds: how long two and three processes wait for one that does not come. The rest has come by then, also on a
# machine with more to do; with three processes two of them must.
TIMEOUT = {2: 0.8, 3: 2.0}


class Network(nn.Module):
    """Two synchronized layers; `order` is the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2, self.bn3 = (batchnorm.SyncBatchNorm(3) for _ in range(3))
        self.order = ["bn1", "bn2", "bn3"]

    def forward(self, x: Tensor) -> Tensor:
        """x through the layers."""
        for name in self.order:
            x = getattr(self, name)(x)
        return x


def told(model: nn.Module, work: Callable[[], object], timeout: float) -> dict[str, Any]:
    """What a piece of work ends with under check_sync, and after how long."""
    dist.barrier()
    start = time.monotonic()
    error = ""
    try:
        with batchnorm.check_sync(model, timeout):
            work()
    except batchnorm.ModelError as wrong:
        error = str(wrong)
    except ValueError as wrong:
        error = repr(wrong)
    return {"error": error, "seconds": time.monotonic() - start}


def mistakes(rank: int, world: int) -> dict[str, Any]:
    """Mistakes that would hang: each must end with an error on every process."""
    x, timeout = torch.randn(4, 3, requires_grad=True), TIMEOUT[world]
    found: dict[str, Any] = {}
    for name, work in {
        "fine": _fine,
        "eval layer": _eval_layer,
        "swapped": _swapped,
        "backward": _backward,
    }.items():
        found[name] = told(model := Network(), lambda work=work, model=model: work(model, x, rank), 30.0)
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())
    for name, work in {"eval model": _eval_model, "late": _late, "fails": _fails}.items():
        found[name] = told(
            model := Network(), lambda work=work, model=model: work(model, x, rank, timeout), timeout
        )
    group = dist.new_group([0, world - 1])
    for layer in (model := Network()).children():
        layer.process_group = group

    def work() -> None:
        if rank in (0, world - 1):
            model(x) if rank == 0 else time.sleep(timeout)

    found["group"] = told(model, work, timeout)
    dist.barrier()
    return found


def _fine(model: Network, x: Tensor, rank: int) -> None:
    """Training, and one process that evaluates alone."""
    for _ in range(4):
        model(x).square().sum().backward()
    if rank == 1:
        model.eval()(x)


def _eval_layer(model: Network, x: Tensor, rank: int) -> None:
    if rank == 1:
        model.bn2.eval()
    model(x)


def _swapped(model: Network, x: Tensor, rank: int) -> None:
    if rank == 1:
        model.order = ["bn1", "bn3", "bn2"]
    model(x)


def _backward(model: Network, x: Tensor, rank: int) -> None:
    """Two losses; rank 1 takes the second first."""
    first, second = model.bn1(x).square().sum(), model.bn2(x).square().sum()
    for loss in (second, first) if rank == 1 else (first, second):
        loss.backward()


def _eval_model(model: Network, x: Tensor, rank: int, timeout: float) -> None:
    """Who has only evaluated is still there when the others give up."""
    model.train(rank != 1)(x)
    if rank == 1:
        time.sleep(1.5 * timeout)


def _late(model: Network, x: Tensor, rank: int, timeout: float) -> None:
    if rank == 1:
        time.sleep(1.5 * timeout)
    model(x)


def _fails(model: Network, x: Tensor, rank: int, timeout: float) -> None:
    model.bn1(x)
    if rank == 1:
        raise ValueError("a bad image")
    model.bn2(x)


def compiled(rank: int, world: int) -> dict[str, Any]:
    """The layer under torch.compile, whole, against the layer as it is."""
    # PyTorch's own: dynamo makes an object of every autograd.Function that it traces, inductor imports torch.jit.
    warnings.filterwarnings("ignore", ".*(should not be instantiated|torch.jit)", DeprecationWarning)
    torch._dynamo.utils.counters.clear()
    found: dict[str, Any] = {}
    for way, most in (("gather", 64), ("reduce", 1)):
        case = Case(activation="relu", residual=True)
        found[way] = []
        for compiles in (False, True):
            layer = batchnorm.SyncBatchNorm(CHANNELS, activation="relu")
            function = torch.compile(layer, fullgraph=True) if compiles else layer
            with gathering(most):
                for step in range(2):
                    mine = case.tensors(step, world)[rank]
                    x, residual = mine["x"].requires_grad_(), mine["residual"].requires_grad_()
                    y = function(x, residual)
                    grads = torch.autograd.grad(y, [x, residual, *layer.parameters()], mine["dy"])
            found[way].append([y.detach(), *grads, *layer.buffers()])
        torch._dynamo.reset()
    found["breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
    return found
