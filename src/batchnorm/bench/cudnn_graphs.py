"""cuDNN's fused graphs of batch norm as a layer, where the package nvidia-cudnn-frontend is installed.

Training forward, training backward and inference are a graph each:

    forward      batch norm, the addition, ReLU, and the mask of ReLU where an addition came before it
    backward     of a mask: dy · mask, whose product is the residual's gradient, then batch norm's backward;
                 of ReLU alone: the pre-activation anew, ReLU's backward, batch norm's backward
    inference    with running statistics

https://github.com/NVIDIA/cudnn-frontend has the functions and their arguments, in python/pygraph.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm._errors import MissingDependencyError
from batchnorm._files import require
from batchnorm.bench.case import Case
from batchnorm.bench.suites import EPILOGUES

__all__ = ["CudnnNorm", "why_not"]

_HALVES = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF"}


def why_not(case: Case) -> str:
    """Why cuDNN's graphs cannot be asked for a case; empty where they can."""
    if not case.device.startswith("cuda"):
        return "cuDNN's graphs run on CUDA devices"
    if case.layout != "channels-last" or getattr(torch, case.dtype) not in _HALVES:
        return "cuDNN's fused graphs of batch norm take channels-last input in bfloat16 or float16"
    if EPILOGUES[case.epilogue].activation not in (None, "relu"):
        return "cuDNN's fused graphs of batch norm have ReLU and no other activation"
    try:
        _library()
    except MissingDependencyError as error:
        return str(error).removesuffix(".")
    return ""


def _library() -> Any:
    return require(
        "cudnn", package="nvidia-cudnn-frontend", purpose="the comparison with cuDNN's fused graph"
    )


@lru_cache
def _handle(device: torch.device) -> Any:
    """One for each device of this process; it lives as long as the process."""
    return _library().create_handle()


def _stream(device: torch.device) -> int:
    """Where the work goes: while a CUDA graph is captured, the stream that it is captured on."""
    return int(torch.cuda.current_stream(device).cuda_stream)


class _Graph:
    """A graph in the making, and then a function of named tensors: those that were declared and those that come out."""

    def __init__(self, like: Tensor) -> None:
        types = _library().data_type
        self.like, self.handle = like, _handle(like.device)
        self.half, self.float, self.bits = getattr(types, _HALVES[like.dtype]), types.FLOAT, types.BOOLEAN
        self.graph = _library().pygraph(
            io_data_type=self.half,
            intermediate_data_type=self.float,
            compute_data_type=self.float,
            handle=self.handle,
        )
        self.places: dict[str, Any] = {}
        self.workspace = torch.empty(0)

    def whole(self, name: str, data_type: Any = None) -> Any:
        """Declare a tensor of the input's shape."""
        shape, strides = list(self.like.shape), list(self.like.stride())
        return self._declare(name, shape, strides, data_type or self.half)

    def column(self, name: str) -> Any:
        """Declare a number a channel."""
        channels, more = self.like.shape[1], [1] * (self.like.dim() - 2)
        return self._declare(name, [1, channels, *more], [channels, 1, *(channels for _ in more)], self.float)

    def number(self, name: str) -> Any:
        """Declare a number that the host has."""
        ones = [1] * self.like.dim()
        return self._declare(name, ones, ones, self.float, is_pass_by_value=True)

    def _declare(
        self, name: str, dim: Sequence[int], stride: Sequence[int], data_type: Any, **more: Any
    ) -> Any:
        place = self.graph.tensor(name=name, dim=dim, stride=stride, data_type=data_type, **more)
        self.places[name] = place
        return place

    def gives(self, name: str, place: Any, data_type: Any) -> None:
        """Make something an output."""
        place.set_output(True)
        place.set_data_type(data_type)
        self.places[name] = place

    def build(self) -> "_Graph":
        """Let cuDNN find a kernel for it; it raises where it has none."""
        library = _library()
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([library.heur_mode.A, library.heur_mode.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()
        size = max(1, self.graph.get_workspace_size())
        self.workspace = torch.empty(size, dtype=torch.uint8, device=self.like.device)
        return self

    def __call__(self, tensors: Mapping[str, Tensor]) -> None:
        """Launch it on the current stream."""
        _library().set_stream(handle=self.handle, stream=_stream(self.like.device))
        pack = {place: tensors[name] for name, place in self.places.items()}
        self.graph.execute(pack, self.workspace, handle=self.handle)


class _Kept(NamedTuple):
    """What forward keeps for backward, beside the input."""

    mean: Tensor
    inv_variance: Tensor
    mask: Tensor | None


class CudnnNorm(nn.Module):
    """batch norm, a residual and ReLU as one graph a direction; `lacks` says, by operation, what cuDNN cannot do.

    Args:
        layer: PyTorch's, whose parameters, buffers, ε and momentum are taken over.
        case: what follows it.
        like: an input.
    """

    def __init__(self, layer: _BatchNorm, case: Case, like: Tensor) -> None:
        super().__init__()
        shape = (1, -1, *(1 for _ in like.shape[2:]))
        for name in ("weight", "bias"):
            setattr(self, name, nn.Parameter(getattr(layer, name).detach().clone()))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(layer, name).clone())
        self.shape = shape
        self.residual, self.relu = (
            EPILOGUES[case.epilogue].residual,
            bool(EPILOGUES[case.epilogue].activation),
        )
        ones = (1,) * like.dim()
        self.numbers = {
            "epsilon": torch.full(ones, layer.eps),
            "momentum": torch.full(ones, layer.momentum or 0.0),
            "zero": torch.zeros(ones),
        }
        self.zeros: Tensor | None = None
        self.inv_variance = torch.rsqrt(self.get_buffer("running_var") + layer.eps)
        self.lacks: dict[str, str] = {}
        self.like = like.detach()
        self.training_forward = self._made("forward", self._forward_graph)
        self.training_backward = self._made("forward+backward", self._backward_graph)
        self.inference = self._made("inference", self._inference_graph)

    @property
    def masked(self) -> bool:
        """Whether backward needs the bits of ReLU: with a residual, the input does not tell them."""
        return self.residual and self.relu

    def _made(self, operation: str, make: Callable[[], _Graph]) -> _Graph | None:
        if operation == "forward+backward" and "forward" in self.lacks:
            self.lacks[operation] = self.lacks["forward"]
            return None
        try:
            return make()
        except Exception as error:  # cuDNN's own classes, which differ between versions
            self.lacks[operation] = f"cuDNN has no such graph here ({_first_line(error)})"
            return None

    def _forward_graph(self) -> _Graph:
        if not self.masked:
            return self._forward_with("")
        try:
            return self._forward_with("zero")
        except (
            Exception
        ):  # the comparison with a number is not in every version; with a tensor of zeros, it is
            self.zeros = torch.zeros_like(self.like)
            return self._forward_with("zeros")

    def _forward_with(self, compared: str) -> _Graph:
        made = _Graph(self.like)
        y, mean, inv_variance, next_mean, next_var = made.graph.batchnorm(
            name="batch_norm",
            input=made.whole("x"),
            scale=made.column("weight"),
            bias=made.column("bias"),
            in_running_mean=made.column("running_mean"),
            in_running_var=made.column("running_var"),
            epsilon=made.number("epsilon"),
            momentum=made.number("momentum"),
        )
        made.gives("mean", mean, made.float)
        made.gives("inv_variance", inv_variance, made.float)
        made.gives("next_mean", next_mean, made.float)
        made.gives("next_var", next_var, made.float)
        y = self._epilogue(made, y)
        if compared:
            other = made.number(compared) if compared == "zero" else made.whole(compared)
            made.gives("mask", made.graph.cmp_gt(name="mask", input=y, comparison=other), made.bits)
        made.gives("y", y, made.half)
        return made.build()

    def _epilogue(self, made: _Graph, y: Any) -> Any:
        if self.residual:
            y = made.graph.add(name="add", a=y, b=made.whole("residual"))
        return made.graph.relu(name="relu", input=y) if self.relu else y

    def _backward_graph(self) -> _Graph:
        made = _Graph(self.like)
        x, g = made.whole("x"), made.whole("dy")
        weight, mean, inv_variance = (made.column(name) for name in ("weight", "mean", "inv_variance"))
        if self.masked:
            g = made.graph.scale(name="masked", input=g, scale=made.whole("mask", made.bits))
            made.gives("dresidual", g, made.half)
        elif self.relu:
            z = made.graph.batchnorm_inference(
                name="again",
                input=x,
                mean=mean,
                inv_variance=inv_variance,
                scale=weight,
                bias=made.column("bias"),
            )
            g = made.graph.relu_backward(name="relu", loss=g, input=z)
            g.set_data_type(made.half)
        dx, dweight, dbias = made.graph.batchnorm_backward(
            name="backward", grad=g, input=x, scale=weight, mean=mean, inv_variance=inv_variance
        )
        made.gives("dx", dx, made.half)
        made.gives("dweight", dweight, made.float)
        made.gives("dbias", dbias, made.float)
        return made.build()

    def _inference_graph(self) -> _Graph:
        made = _Graph(self.like)
        y = made.graph.batchnorm_inference(
            name="batch_norm",
            input=made.whole("x"),
            mean=made.column("running_mean"),
            inv_variance=made.column("inv_variance"),
            scale=made.column("weight"),
            bias=made.column("bias"),
        )
        made.gives("y", self._epilogue(made, y), made.half)
        return made.build()

    def train(self, mode: bool = True) -> "CudnnNorm":
        """Training or, from the running statistics of this moment, inference."""
        if not mode:
            self.inv_variance = torch.rsqrt(self.get_buffer("running_var") + self.numbers["epsilon"].item())
        return super().train(mode)

    def _column(self, tensor: Tensor) -> Tensor:
        return tensor.detach().view(self.shape)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """y = act(bn(x) + residual)."""
        if self.training:
            y: Tensor = _Training.apply(x, residual, self.weight, self.bias, self)  # type: ignore[no-untyped-call]
            return y
        y = torch.empty_like(x)
        tensors = {
            **self._given(x, residual),
            "inv_variance": self._column(self.inv_variance),
            "y": y,
        }
        _called(self.inference, tensors)
        return y

    def _given(self, x: Tensor, residual: Tensor | None) -> dict[str, Tensor]:
        columns = {
            name: self._column(getattr(self, name))
            for name in ("weight", "bias", "running_mean", "running_var")
        }
        more = {"residual": residual, "zeros": self.zeros}
        return {
            "x": x,
            **columns,
            **self.numbers,
            **{n: each for n, each in more.items() if each is not None},
        }

    def train_forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, _Kept]:
        """y, and what backward needs; the running statistics move."""
        given = self._given(x, residual)
        y, mean = torch.empty_like(x), torch.empty_like(given["weight"])
        mask = torch.empty_like(x, dtype=torch.bool) if self.masked else None
        kept = _Kept(mean, torch.empty_like(mean), mask)
        results = {
            "y": y,
            "mean": mean,
            "inv_variance": kept.inv_variance,
            "next_mean": given["running_mean"],
            "next_var": given["running_var"],
        }
        _called(self.training_forward, {**given, **results, **({} if mask is None else {"mask": mask})})
        self.get_buffer("num_batches_tracked").add_(1)
        return y, kept

    def train_backward(
        self, x: Tensor, dy: Tensor, kept: _Kept
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """dx, the residual's gradient, dweight, dbias."""
        if dy.stride() != x.stride():
            dy = torch.empty_like(x).copy_(dy)
        dx, dweight, dbias = torch.empty_like(x), torch.empty_like(kept.mean), torch.empty_like(kept.mean)
        dresidual = torch.empty_like(x) if self.masked else dy if self.residual else None
        tensors: dict[str, Tensor | None] = {
            **{name: self._column(getattr(self, name)) for name in ("weight", "bias")},
            **kept._asdict(),
            **{"x": x, "dy": dy, "dx": dx, "dresidual": dresidual, "dweight": dweight, "dbias": dbias},
        }
        _called(self.training_backward, {name: each for name, each in tensors.items() if each is not None})
        return dx, dresidual, dweight.view(-1), dbias.view(-1)


class _Training(torch.autograd.Function):
    """A training step of a `CudnnNorm`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, layer: CudnnNorm
    ) -> Tensor:
        """One launch."""
        y, kept = layer.train_forward(x, residual)
        ctx.layer = layer
        ctx.save_for_backward(x, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """One launch."""
        x, *kept = ctx.saved_tensors
        return *ctx.layer.train_backward(x, dy, _Kept(*kept)), None


def _called(graph: _Graph | None, tensors: Mapping[str, Tensor]) -> None:
    if graph is None:
        raise RuntimeError("cuDNN has no such graph here")
    graph(tensors)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:100] if lines else type(error).__name__
