"""The arithmetic of folding: batch norm with given statistics is y = s·x + t in each channel, and so is a layer."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from batchnorm.surgery import _kinds as kinds

__all__ = ["Folded", "Norm", "Weights", "dimensions", "reaches_all", "takes_shift"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def dimensions(layer: nn.Module) -> int:
    """How many axes a layer's output has behind the channels: 0 for a linear one."""
    for axes, classes in enumerate(
        ((nn.Conv1d, nn.ConvTranspose1d), (nn.Conv2d, nn.ConvTranspose2d), (nn.Conv3d, nn.ConvTranspose3d)), 1
    ):
        if isinstance(layer, classes):
            return axes
    return 0


def takes_shift(layer: nn.Module) -> str:
    """Why a constant added to the input of a layer is not one added to its output; "" where it is.

    Zeros that a layer pads with do not get the constant, so that its effect is another one at the border. The other
    padding modes repeat what is there.
    """
    if isinstance(layer, nn.Linear):
        return ""
    size: Any = layer.kernel_size
    padding: Any = layer.padding
    if isinstance(layer, _TRANSPOSED):
        return reaches_all(size, padding, stride=layer.stride, more=layer.output_padding)
    return reaches_all(size, padding if layer.padding_mode == "zeros" else "valid")


def reaches_all(
    kernel: Sequence[int],
    padding: Sequence[int] | str,
    *,
    stride: Sequence[int] | None = None,
    more: Sequence[int] = (),
) -> str:
    """Why a convolution's output places do not all see as many places of the input; "" where they do.

    Args:
        kernel: its size on each axis.
        padding: with zeros; a size of one that is 'same' pads nothing.
        stride: of a transposed convolution; None for another one.
        more: a transposed convolution's output padding.
    """
    if stride is not None:
        single = set(kernel) | set(stride) <= {1} and not isinstance(padding, str)
        plain = single and set(padding) <= {0} and set(more) <= {0}
        return "" if plain else "it reaches the places of a transposed convolution's output unequally often"
    same = isinstance(padding, str) and padding != "valid" and set(kernel) != {1}
    pads = same or not (isinstance(padding, str) or set(padding) <= {0})
    return "the zeros that the layer pads its input with do not get it" if pads else ""


def _float64(tensor: Tensor | None, size: int, default: float) -> Tensor:
    if tensor is None:
        return torch.full((size,), default, dtype=torch.float64)
    return tensor.detach().to("cpu", torch.float64)


def _held(module: nn.Module, name: str) -> Tensor:
    """The tensor that a layer has under this name."""
    held = {**module._parameters, **module._buffers}[name]
    assert held is not None  # asked for only where it is there
    return held


@dataclass
class Norm:
    """Batch norm with its running statistics, y = γ·(x − mean)/√(var + ε) + β, in float64."""

    mean: Tensor
    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, module: nn.Module) -> "Norm":
        """The numbers of a layer."""
        size = int(module.num_features)  # type: ignore[arg-type]
        return cls.given(
            size,
            module._buffers["running_mean"],
            module._buffers["running_var"],
            module._parameters.get("weight"),
            module._parameters.get("bias"),
            float(module.eps),  # type: ignore[arg-type]
        )

    @classmethod
    def given(
        cls,
        size: int,
        mean: Tensor | None,
        var: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        eps: float,
    ) -> "Norm":
        """These numbers; what is None is that of a new layer."""
        scale = _float64(gamma, size, 1.0) / (_float64(var, size, 1.0) + eps).sqrt()
        return cls(_float64(mean, size, 0.0), scale, _float64(beta, size, 0.0))

    def after(self, first: "Norm") -> "Norm":
        """This batch norm of the first one's output: s₂·(s₁·(x − m₁) + β₁ − m₂) + β₂."""
        return Norm(first.mean, self.scale * first.scale, self.scale * (first.shift - self.mean) + self.shift)

    def as_layer(self, module: nn.Module) -> dict[str, Tensor]:
        """The running mean, weight and bias with which this layer and its running variance compute it."""
        var = _float64(module._buffers["running_var"], 0, 1.0)
        new = {
            "running_mean": self.mean,
            "weight": self.scale * (var + float(module.eps)).sqrt(),  # type: ignore[arg-type]
            "bias": self.shift,
        }
        return {name: value.to(_held(module, name)) for name, value in new.items()}

    @property
    def offset(self) -> Tensor:
        """t in y = s·x + t."""
        return self.shift - self.mean * self.scale


@dataclass
class Weights:
    """The weight (out, in / groups, *kernel) and the bias of a layer while batch norms are folded into it, in float64.

    A transposed convolution's weight is (in, out / groups, *kernel).
    """

    weight: Tensor
    bias: Tensor
    groups: int = 1
    transposed: bool = False

    @property
    def width(self) -> int:
        """How many channels the layer gives."""
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]

    @property
    def depth(self) -> int:
        """How many channels the layer takes."""
        return self.weight.shape[0] if self.transposed else self.weight.shape[1] * self.groups

    def then(self, norm: Norm) -> Self:
        """Batch norm behind the layer: W ← s·W, b ← s·(b − mean) + β, per channel of the output."""
        new, shape = copy.copy(self), self.weight.shape
        if self.transposed:  # the channels of a group's output lie on axis 1
            grouped = self.weight.reshape(self.groups, shape[0] // self.groups, *shape[1:])
            scale = norm.scale.reshape(self.groups, 1, shape[1], *[1] * (len(shape) - 2))
            new.weight = (grouped * scale).reshape(shape)
        else:
            new.weight = self.weight * norm.scale.reshape(-1, *[1] * (len(shape) - 1))
        new.bias = norm.scale * (self.bias - norm.mean) + norm.shift
        return new

    def preceded(self, norm: Norm) -> Self:
        """Batch norm before the layer: W ← W·s per channel of the input, b ← b + Σ W·t."""
        new, shape, kernel = copy.copy(self), self.weight.shape, [1] * (self.weight.dim() - 2)
        spread = tuple(range(2, self.weight.dim()))
        taps = self.weight.sum(spread) if spread else self.weight
        grouped = taps.reshape(self.groups, shape[0] // self.groups, shape[1])
        offset = norm.offset.reshape(self.groups, -1)
        if self.transposed:
            shift = torch.einsum("gio,gi->go", grouped, offset)
            new.weight = self.weight * norm.scale.reshape(-1, 1, *kernel)
        else:
            shift = torch.einsum("goi,gi->go", grouped, offset)
            scale = norm.scale.reshape(self.groups, 1, shape[1], *kernel)
            new.weight = (self.weight.reshape(self.groups, -1, *shape[1:]) * scale).reshape(shape)
        new.bias = self.bias + shift.reshape(-1)
        return new

    def fit(self, largest: float) -> bool:
        """Whether all numbers that are numbers are at most so large."""
        both = torch.cat([self.weight.reshape(-1), self.bias])
        return not bool((both.isfinite() & (both.abs() > largest)).any())


class Folded(Weights):
    """The weights of a layer of a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(
            weight=_float64(layer._parameters["weight"], 0, 0.0),
            bias=_float64(layer._parameters.get("bias"), kinds.width(layer), 0.0),
            groups=1 if isinstance(layer, nn.Linear) else int(layer.groups),  # type: ignore[arg-type]
            transposed=isinstance(layer, _TRANSPOSED),
        )
        self.layer = layer

    def parameters(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Weight and bias in the layer's dtype, on its device."""
        old = _held(self.layer, "weight")
        weight = torch.empty_like(old.detach()).copy_(self.weight)
        bias = self.bias.to(old.device, old.dtype)
        wanted = bool(old.requires_grad)
        return nn.Parameter(weight, requires_grad=wanted), nn.Parameter(bias, requires_grad=wanted)

    @property
    def fits(self) -> bool:
        """Whether the dtype of the layer can hold the numbers."""
        return self.fit(torch.finfo(_held(self.layer, "weight").dtype).max)
