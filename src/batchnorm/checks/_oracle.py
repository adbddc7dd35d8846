"""The self-test: a layer on its own device and in its own dtype against the reference in float64 on the CPU."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.checks._alone import copy_of, input_for, is_plain
from batchnorm.checks._watching import Norms
from batchnorm.checks.evidence import Seen
from batchnorm.functional import batch_norm
from batchnorm.nn.batch_norm import Extras
from batchnorm.nn.families import FAMILIES
from batchnorm.surgery._convert import new_class, recast

__all__ = ["self_tested"]

# Elements of an input: 4 MB in float32.
_MOST = 1 << 20
# So many different shapes; layers of the same class, shape, dtype and layout are tested once.
_TESTED = 12
# Relative to the largest value, of output and gradients. What PyTorch 2.13 does on a CPU with such numbers: 2e-6 in
# float32, 5e-16 in float64, 4e-3 in bfloat16, 5e-4 in float16; a fault is far above.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def self_tested(norms: Norms, seen: Mapping[str, Seen]) -> dict[str, Seen]:
    """The same notes, with the error of every layer that can be tested by itself."""
    found = dict(seen)
    errors: dict[tuple[object, ...], tuple[float | None, str]] = {}
    for name, layer in norms:
        notes = seen.get(name)
        bound = None if notes is None or notes.dtype is None else BOUNDS.get(notes.dtype)
        if notes is None or bound is None or not notes.training or not notes.train or not is_plain(layer):
            continue
        weight = layer.weight
        kind = (
            type(layer),
            notes.shape,
            notes.dtype,
            notes.channels_last,
            None if weight is None else (weight.dtype, weight.device),
            getattr(layer, "activation", None),
            getattr(layer, "backend", None),
        )
        if kind not in errors:
            if len(errors) == _TESTED:
                continue
            errors[kind] = _test(layer, notes, bound)
        error, instead = errors[kind]
        found[name] = replace(notes, error=error, error_bound=bound, instead=instead)
    return found


def _test(layer: _BatchNorm, seen: Seen, bound: float) -> tuple[float | None, str]:
    """The largest error of output and gradients, and what passes where that is above the bound.

    None where the layer cannot be run by itself.
    """
    x = input_for(layer, seen, _MOST)
    if x is None or x.shape[0] * x.shape[2:].numel() < 2:
        return None, ""
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    with torch.enable_grad():
        expected = _reference(layer, x.cpu().double(), dy.cpu().double())
        error = _error(copy_of(layer), x, dy, expected)
        if error is None or error <= bound:
            return error, ""
        for instead, other in _others(layer):
            its = _error(other, x, dy, expected)
            if its is not None and its <= bound:
                return error, instead
    return error, ""


def _error(layer: _BatchNorm, x: Tensor, dy: Tensor, expected: list[Tensor]) -> float | None:
    try:
        got = _run(layer, x, dy)
    except (
        RuntimeError,
        NotImplementedError,
    ):  # under the user's autocast it may take what it does not take alone
        return None
    return max(_apart(a, b) for a, b in zip(got, expected, strict=True))


def _others(layer: _BatchNorm) -> Iterator[tuple[str, _BatchNorm]]:
    """Copies of the layer that compute the same in another way, the faster first."""
    for instead, backend in (("batchnorm", None), ("reference", "reference")):
        twin = copy_of(layer)
        if isinstance(twin, Extras):
            twin.backend = backend or twin.backend
        else:
            cls, _ = new_class(twin, FAMILIES["batchnorm"], 0, ())
            if cls is None:
                return
            recast(twin, cls, {"backend": backend})
        if instead == "reference" or not isinstance(layer, Extras):
            yield instead, twin


def _run(layer: _BatchNorm, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    wanted = [x, *layer.parameters()]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def _reference(layer: _BatchNorm, x: Tensor, dy: Tensor) -> list[Tensor]:
    twin = copy_of(layer).cpu().double()
    if isinstance(twin, Extras):
        twin.backend = "reference"
        return _run(twin, x, dy)
    x = x.requires_grad_()
    y = batch_norm(x, None, None, twin.weight, twin.bias, True, eps=twin.eps, backend="reference")
    return [y.detach(), *torch.autograd.grad(y, [x, *twin.parameters()], dy)]


def _apart(got: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    error = (got.cpu().double() - expected).abs().max() / scale
    return float(error) if error.isfinite() else float("inf")
