"""The arithmetic of folding: batch norm with given statistics is y = s·x + t in each channel, and so is a layer."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.surgery import _kinds as kinds

__all__ = ["Folded", "Norm", "dimensions", "takes_shift"]

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
        single = set(size) == set(layer.stride) == {1}
        plain = single and set(padding) == {0} and set(layer.output_padding) == {0}
        return "" if plain else "it reaches the places of a transposed convolution's output unequally often"
    pads = padding not in ("valid", "same") and set(padding) != {0}
    pads = pads or (padding == "same" and set(size) != {1})
    if pads and layer.padding_mode == "zeros":
        return "the zeros that the layer pads its input with do not get it"
    return ""


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
        mean = _float64(module._buffers["running_mean"], size, 0.0)
        var = _float64(module._buffers["running_var"], size, 1.0)
        gamma = _float64(module._parameters.get("weight"), size, 1.0)
        beta = _float64(module._parameters.get("bias"), size, 0.0)
        return cls(mean, gamma / (var + float(module.eps)).sqrt(), beta)  # type: ignore[arg-type]

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


class Folded:
    """The weight and the bias of a layer while batch norms are folded into it, in float64 on the CPU."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.width = kinds.width(layer)
        self.groups = 1 if isinstance(layer, nn.Linear) else int(layer.groups)  # type: ignore[arg-type]
        self.transposed = isinstance(layer, _TRANSPOSED)
        self.weight = _float64(layer._parameters["weight"], 0, 0.0)
        self.bias = _float64(layer._parameters.get("bias"), self.width, 0.0)

    def then(self, norm: Norm) -> "Folded":
        """Batch norm behind the layer: W ← s·W, b ← s·(b − mean) + β, per channel of the output."""
        new, shape = copy.copy(self), self.weight.shape
        if self.transposed:  # (in, out / groups, *kernel): the channels of a group's output lie on axis 1
            grouped = self.weight.reshape(self.groups, shape[0] // self.groups, *shape[1:])
            scale = norm.scale.reshape(self.groups, 1, shape[1], *[1] * (len(shape) - 2))
            new.weight = (grouped * scale).reshape(shape)
        else:
            new.weight = self.weight * norm.scale.reshape(-1, *[1] * (len(shape) - 1))
        new.bias = norm.scale * (self.bias - norm.mean) + norm.shift
        return new

    def preceded(self, norm: Norm) -> "Folded":
        """Batch norm before the layer: W ← W·s per channel of the input, b ← b + Σ W·t."""
        new, shape, kernel = copy.copy(self), self.weight.shape, [1] * (self.weight.dim() - 2)
        spread = tuple(range(2, self.weight.dim()))
        taps = self.weight.sum(spread) if spread else self.weight
        if self.transposed:
            grouped = taps.reshape(self.groups, shape[0] // self.groups, shape[1])
            shift = torch.einsum("gio,gi->go", grouped, norm.offset.reshape(self.groups, -1))
            new.weight = self.weight * norm.scale.reshape(-1, 1, *kernel)
        else:
            grouped = taps.reshape(self.groups, shape[0] // self.groups, shape[1])
            shift = torch.einsum("goi,gi->go", grouped, norm.offset.reshape(self.groups, -1))
            scale = norm.scale.reshape(self.groups, 1, shape[1], *kernel)
            new.weight = (self.weight.reshape(self.groups, -1, *shape[1:]) * scale).reshape(shape)
        new.bias = self.bias + shift.reshape(-1)
        return new

    def parameters(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Weight and bias in the layer's dtype, on its device."""
        old = _held(self.layer, "weight")
        weight = torch.empty_like(old.detach()).copy_(self.weight)
        bias = self.bias.to(old.device, old.dtype)
        wanted = bool(old.requires_grad)
        return nn.Parameter(weight, requires_grad=wanted), nn.Parameter(bias, requires_grad=wanted)

    @property
    def fits(self) -> bool:
        """Whether the dtype of the layer can hold the numbers, where they are numbers."""
        largest = torch.finfo(_held(self.layer, "weight").dtype).max
        both = torch.cat([self.weight.reshape(-1), self.bias])
        return not bool((both.isfinite() & (both.abs() > largest)).any())
