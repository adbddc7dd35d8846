"""A stand-in for the package `cudnn` (nvidia-cudnn-frontend): the part of its graph API that the benchmark calls.

The functions and the names of their arguments are those of python/pygraph/norm.cpp, pointwise.cpp and pygraph.cpp of
that package at 1.23. `execute` computes with PyTorch, on whatever device the tensors are; without validate, plans and
support in their order it refuses, and so it does when a tensor is missing or has other strides than were declared.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

ORDER = ["validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans"]
DTYPES = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF", torch.float32: "FLOAT", torch.bool: "BOOLEAN"}

data_type = SimpleNamespace(**{name: name for name in DTYPES.values()})
heur_mode = SimpleNamespace(A="A", FALLBACK="FALLBACK")
calls: list[tuple[str, dict[str, Any]]] = []
refused: set[str] = set()


class cudnnGraphNotSupportedError(RuntimeError):  # noqa: N801
    pass


class Place:
    """A tensor of a graph: declared with a shape, or computed by a function of others."""

    def __init__(self, compute: Any = None, **declared: Any) -> None:
        self.compute, self.declared, self.output, self.type = compute, declared, False, None

    def set_output(self, is_output: bool) -> "Place":
        self.output = is_output
        return self

    def set_data_type(self, data_type: str) -> "Place":
        self.type = data_type
        return self


def create_handle() -> int:
    calls.append(("create_handle", {}))
    return 7


def set_stream(handle: int, stream: int) -> None:
    calls.append(("set_stream", {"handle": handle, "stream": stream}))


class pygraph:  # noqa: N801
    def __init__(
        self, *, io_data_type: str, intermediate_data_type: str, compute_data_type: str, handle: int
    ) -> None:
        assert (intermediate_data_type, compute_data_type, handle) == ("FLOAT", "FLOAT", 7)
        self.io, self.steps, self.places, self.operations = io_data_type, [], [], []

    def tensor(
        self,
        dim: list[int],
        stride: list[int],
        data_type: str,
        is_virtual: bool = False,
        is_pass_by_value: bool = False,
        name: str = "",
    ) -> Place:
        place = Place(dim=dim, stride=stride, type=data_type, by_value=is_pass_by_value, name=name)
        self.places.append(place)
        return place

    def _made(self, operation: str, compute: Any, count: int = 1) -> Any:
        calls.append((operation, {}))
        self.operations.append(operation)
        if count == 1:
            place = Place(compute)
            self.places.append(place)
            return place
        parts = [Place(lambda at, number=number: compute(at)[number]) for number in range(count)]
        self.places += parts
        return parts

    def batchnorm(
        self,
        *,
        input: Place,
        scale: Place,
        bias: Place,
        in_running_mean: Place,
        in_running_var: Place,
        epsilon: Place,
        momentum: Place,
        name: str = "",
    ) -> list[Place]:
        def compute(at: Any) -> tuple[Tensor, ...]:
            x, rate = at(input).float(), float(at(momentum))
            axes = [0, *range(2, x.dim())]
            var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
            inverse = torch.rsqrt(var + float(at(epsilon)))
            y = (x - mean) * inverse * at(scale) + at(bias)
            count = x.numel() / x.shape[1]
            next_mean = (1 - rate) * at(in_running_mean) + rate * mean
            next_var = (1 - rate) * at(in_running_var) + rate * var * count / (count - 1)
            return y, mean, inverse, next_mean, next_var

        return self._made("batchnorm", compute, 5)

    def batchnorm_inference(
        self, *, input: Place, mean: Place, inv_variance: Place, scale: Place, bias: Place, name: str = ""
    ) -> Place:
        return self._made(
            "batchnorm_inference",
            lambda at: (at(input).float() - at(mean)) * at(inv_variance) * at(scale) + at(bias),
        )

    def batchnorm_backward(
        self, *, grad: Place, input: Place, scale: Place, mean: Place, inv_variance: Place, name: str = ""
    ) -> list[Place]:
        def compute(at: Any) -> tuple[Tensor, ...]:
            g, x = at(grad).float(), at(input).float()
            axes = [0, *range(2, x.dim())]
            hat = (x - at(mean)) * at(inv_variance)
            dbias, dscale = g.sum(axes, keepdim=True), (g * hat).sum(axes, keepdim=True)
            count = x.numel() / x.shape[1]
            dx = at(scale) * at(inv_variance) * (g - dbias / count - hat * dscale / count)
            return dx, dscale, dbias

        return self._made("batchnorm_backward", compute, 3)

    def add(self, *, a: Place, b: Place, name: str = "") -> Place:
        return self._made("add", lambda at: at(a).float() + at(b).float())

    def relu(self, *, input: Place, name: str = "") -> Place:
        return self._made("relu", lambda at: at(input).relu())

    def relu_backward(self, *, loss: Place, input: Place, name: str = "") -> Place:
        return self._made("relu_backward", lambda at: at(loss).float() * (at(input) > 0))

    def cmp_gt(self, *, input: Place, comparison: Place, name: str = "") -> Place:
        kind = "cmp_gt with a number" if comparison.declared["by_value"] else "cmp_gt with a tensor"
        return self._made(kind, lambda at: at(input) > at(comparison))

    def scale(self, *, input: Place, scale: Place, name: str = "") -> Place:
        return self._made("scale", lambda at: at(input).float() * at(scale))

    def validate(self) -> None:
        self.steps.append("validate")

    def build_operation_graph(self) -> None:
        self.steps.append("build_operation_graph")

    def create_execution_plans(self, modes: list[str]) -> None:
        assert modes == ["A", "FALLBACK"]
        self.steps.append("create_execution_plans")

    def check_support(self) -> None:
        missing = refused & set(self.operations)
        if missing:
            raise cudnnGraphNotSupportedError(f"no engine for {min(missing)}\nand more of it")
        self.steps.append("check_support")

    def build_plans(self) -> None:
        self.steps.append("build_plans")

    def get_workspace_size(self) -> int:
        assert self.steps == ORDER
        return 0

    def execute(self, pack: dict[Place, Tensor], workspace: Tensor, handle: int) -> None:
        assert self.steps == ORDER
        assert (workspace.dtype, workspace.numel(), handle) == (torch.uint8, 1, 7)
        assert calls[-1][0] == "set_stream"
        known: dict[Place, Tensor] = {}

        def at(place: Place) -> Tensor:
            if place.declared:
                tensor = pack[place]
                assert list(tensor.shape) == place.declared["dim"], place.declared["name"]
                if tensor.numel() > tensor.shape[1]:
                    assert list(tensor.stride()) == place.declared["stride"], place.declared["name"]
                assert DTYPES[tensor.dtype] == place.declared["type"], place.declared["name"]
                return tensor
            if place not in known:
                known[place] = place.compute(at)
                if place.type and place.type != "BOOLEAN":
                    kind = next(dtype for dtype, name in DTYPES.items() if name == place.type)
                    known[place] = known[place].to(kind)
            return known[place]

        outputs = [place for place in self.places if place.output]
        results = {place: at(place) for place in outputs}
        assert set(pack) == {place for place in self.places if place.declared or place.output}
        for place, result in results.items():
            assert DTYPES[pack[place].dtype] == place.type
            pack[place].copy_(result)
