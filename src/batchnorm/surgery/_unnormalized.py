"""What stays of one of our layers when its batch norm is taken out."""

from collections.abc import Callable

import torch
import torch.fx
from torch import Tensor, nn

from batchnorm._activations import activation_named
from batchnorm._errors import InputError, message
from batchnorm.nn._unscriptable import Unscriptable

__all__ = ["Rows", "Unnormalized", "activation_layer", "matched", "rows", "shielded"]


# torch.fx does not look into them: shapes and choices are known in a real call only.
torch.fx.wrap("shielded")
torch.fx.wrap("placed")
torch.fx.wrap("rows")
torch.fx.wrap("matched")


def shielded(output: Tensor, mask: Tensor) -> Tensor:
    """`output` (N, C, *S) with zeros where the mask (N, *S) is zero.

    It stands before the activation: every activation here maps 0 to 0, and this way neither a NaN under the mask nor
    its gradient gets through.
    """
    axes = (1,) * (output.dim() - 1 - mask.dim()) + tuple(mask.shape)
    return torch.where(mask.reshape(axes).unsqueeze(1) != 0, output, output.new_zeros(()))


def placed(output: Tensor, input: Tensor, inplace: bool) -> Tensor:
    """`output`, or with `inplace` the input, which then holds its values."""
    return input.copy_(output) if inplace else output


class Unnormalized(Unscriptable, nn.Module):
    """y = act(input + residual), and 0 where the mask is 0: one of our batch norms without the batch norm.

    It takes the arguments of the layer that it stands for. `activation` is None or one of the layer's
    activations, `negative_slope` is leaky_relu's.

    Example:
        >>> import torch
        >>> Unnormalized("relu")(torch.tensor([[-1.0, 2.0]]), residual=torch.tensor([[3.0, 3.0]]))
        tensor([[2., 5.]])
    """

    def __init__(self, activation: str | None = None, negative_slope: float = 0.01) -> None:
        super().__init__()
        activation_named(activation)
        self.activation = activation
        self.negative_slope = negative_slope

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        inplace: bool = False,
    ) -> Tensor:
        """Shapes: input and residual (N, C, *S), mask (N, *S), whose missing leading axes broadcast."""
        output = input if residual is None else input + residual
        if mask is not None:
            output = shielded(output, mask)
        activation = activation_named(self.activation)
        if activation is not None:
            output = activation.forward(output, self.negative_slope)
        return placed(output, input, inplace)

    def extra_repr(self) -> str:
        """The options, as in the constructor."""
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        return f"activation={self.activation!r}{slope}"


def rows(input: Tensor) -> Tensor:
    """The input, which has to be (N, C)."""
    if input.dim() != 2:
        raise InputError(
            message(
                "a batch norm that was folded into a linear layer",
                got=f"input of shape {tuple(input.shape)}",
                expected="(N, C): beyond two axes its channels are not the linear layer's",
                fix="Pass an example of the input to batchnorm.fold.",
            )
        )
    return input


def matched(residual: Tensor, input: Tensor) -> Tensor:
    """What is added to a layer's output, in the shape of its input."""
    if residual.shape == input.shape:
        return residual
    try:
        return residual.expand(input.shape)
    except RuntimeError:
        raise InputError(
            message(
                "an addition that batchnorm.fuse took into a batch norm",
                got=f"{tuple(residual.shape)} added to {tuple(input.shape)}",
                expected="a sum with the shape of the batch norm's output",
                fix="Revert the fusion, or fuse the model without this block.",
            )
        ) from None


class Rows(nn.Module):
    """What stays of a batch norm behind or before a linear layer, where the number of axes was not known.

    BatchNorm1d takes (N, C) and (N, C, L), a linear layer has its channels last: only in (N, C) are the two one
    affine map. Any other input raises an InputError.

    Example:
        >>> import torch
        >>> Rows()(torch.ones(1, 2))
        tensor([[1., 1.]])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Shape: (N, C)."""
        return rows(input)


def activation_layer(name: str | None, negative_slope: float) -> nn.Module:
    """PyTorch's layer for one of the activations that a batch norm may hold; the identity for None."""
    activation_named(name)
    layers: dict[str | None, Callable[[], nn.Module]] = {
        None: nn.Identity,
        "relu": nn.ReLU,
        "relu6": nn.ReLU6,
        "leaky_relu": lambda: nn.LeakyReLU(negative_slope),
        "silu": nn.SiLU,
        "hardswish": nn.Hardswish,
        "gelu": nn.GELU,
    }
    return layers[name]()
