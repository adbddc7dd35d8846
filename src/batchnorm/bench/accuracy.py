"""How far a layer is from float64: what has to be right before a time is shown."""

from collections.abc import Callable, Container, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from batchnorm.bench.case import OPERATIONS, Case
from batchnorm.bench.contenders import Inputs, gradients, operation, reset_statistics
from batchnorm.bench.suites import EPILOGUES

__all__ = ["Exact", "complaint", "errors", "exact"]

# Of the largest pre-activation: nearer to a kink of the activation, rounding decides on the slope, and either is right.
_KINK = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# Of the largest value. Half types: the spacing of their numbers. PyTorch adds channels-last float32 in float32; a wrong
# formula is off by far more than what that costs.
_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
_ATEN_TOLERANCE = {**_TOLERANCE, torch.float32: 1e-3}

_NAMES = ("y", "dx", "dweight", "dbias", "dresidual")


class Exact:
    """What float64 gives for a case: y, the gradients, y of inference, and the dy that they belong to."""

    def __init__(self, given: Inputs, dy: Tensor, values: Mapping[str, Tensor]) -> None:
        self.given = replace(given, dy=dy)
        self.values = values


def exact(case: Case, given: Inputs) -> Exact:
    """Compute a case in float64 with PyTorch's own operators, on a contiguous copy."""
    x, residual = (
        None if t is None else t.detach().double().contiguous().requires_grad_()
        for t in (given.x, given.residual)
    )
    assert x is not None  # for the type checker
    weight, bias = (t.double().requires_grad_() for t in (given.weight, given.bias))
    mean, var = given.running_mean.double(), given.running_var.double()

    def before(training: bool) -> Tensor:
        z = nn.functional.batch_norm(
            x, None if training else mean, None if training else var, weight, bias, training=training
        )
        return z if residual is None else z + residual

    z = before(training=True)
    y = _activated(z, case.epilogue)
    dy = _smooth(given, z.detach(), case.epilogue)
    wanted = [x, weight, bias, *(() if residual is None else (residual,))]
    found = torch.autograd.grad(y, wanted, dy.double())
    values = dict(zip(_NAMES, (y.detach(), *found), strict=False))
    with torch.no_grad():
        values["y of inference"] = _activated(before(training=False), case.epilogue)
    return Exact(given, dy, values)


def errors(
    function: Callable[..., Tensor],
    layer: nn.Module,
    truth: Exact,
    add: Callable[[Tensor], object] | None = None,
    tasks: Container[str] = OPERATIONS,
) -> dict[str, float]:
    """max|got − exact| / max|exact| of everything that a layer computes; NaN where it computes NaN.

    Where several processes have parts of the batch, `add` makes of a parameter's gradient the sum of theirs. `tasks`
    are the operations that the layer can do.
    """
    got: dict[str, Tensor] = {}
    if "forward+backward" in tasks:
        got.update(zip(_NAMES, gradients(function, layer.train(), truth.given), strict=False))
    elif "forward" in tasks:
        got["y"] = _output("forward", function, layer, truth)
    if add is not None:
        for name in ("dweight", "dbias"):
            add(got[name])
    reset_statistics(layer, truth.given)
    if "inference" in tasks:
        got["y of inference"] = _output("inference", function, layer, truth)
    return {name: _error(got[name].detach(), want) for name, want in truth.values.items() if name in got}


def _output(task: str, function: Callable[..., Tensor], layer: nn.Module, truth: Exact) -> Tensor:
    answer = operation(task, function, layer, truth.given)()
    assert isinstance(answer, Tensor)  # for the type checker
    return answer


def complaint(found: Mapping[str, float], dtype: torch.dtype, backend: str) -> str:
    """What is wrong with a layer, in one sentence; empty where nothing is."""
    tolerance = (_ATEN_TOLERANCE if backend == "aten" else _TOLERANCE)[dtype]
    for name, error in found.items():
        if not error <= tolerance:
            return f"{name} is off by {error:.1e} of its largest value, at most {tolerance:.1e} is allowed"
    return ""


def _error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("nan")
    scale = want.abs().max()
    return float((got.double() - want).abs_().max() / scale) if scale > 0 else float(got.abs().max())


def _activated(z: Tensor, epilogue: str) -> Tensor:
    activation = EPILOGUES[epilogue].activation
    return {"relu": torch.relu, "relu6": nn.functional.relu6}[activation](z) if activation else z


def _smooth(given: Inputs, z: Tensor, epilogue: str) -> Tensor:
    """dy with zeros where the pre-activation lies near a kink."""
    activation = EPILOGUES[epilogue].activation
    if activation is None:
        return given.dy
    width = _KINK[given.x.dtype] * z.abs().max()
    near = z.abs() < width
    if activation == "relu6":
        near |= (z - 6).abs() < width
    return given.dy.masked_fill(near, 0)
