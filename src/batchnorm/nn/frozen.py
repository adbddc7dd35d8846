"""FrozenBatchNorm, and the mixin of every layer whose statistics stay."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from batchnorm._errors import ModelError, message
from batchnorm.nn.families import Family, register
from batchnorm.nn.member import Member

__all__ = ["Frozen", "FrozenBatchNorm"]


class Frozen(Module):
    """The base of the classes of frozen layers: always in evaluation mode, whatever mode they are put in.

    The mode that they are put in is remembered, and is theirs again when they are unfrozen.
    """

    @property
    def training(self) -> bool:
        """False."""
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["training"] = mode

    def reset_running_stats(self) -> None:
        """Nothing: frozen statistics stay, in torch.optim.swa_utils.update_bn, too."""

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """The layer's children; refuses torch.nn.SyncBatchNorm.convert_sync_batchnorm."""
        # It would put a layer there that is trained again at the next train(). It asks a layer for its children last.
        if sys._getframe(1).f_code.co_name == "convert_sync_batchnorm":
            raise ModelError(
                message(
                    "convert_sync_batchnorm",
                    got=f"a {type(self).__name__}, which would be frozen no longer",
                    expected="layers that are trained",
                    fix="Use batchnorm.convert(model, 'torch-sync'), which leaves frozen layers alone.",
                )
            )
        return super().named_children()


class FrozenBatchNorm(Frozen, Member):
    r"""Batch norm that is never trained, for backbones of detectors and other fine-tuning on small batches.

    $$y = \mathrm{act}\left(\frac{x - \mathrm{running\_mean}}{\sqrt{\mathrm{running\_var} + \varepsilon}} \cdot
    \gamma + \beta + \mathrm{residual}\right)$$

    The running statistics are used in training, too, and nothing but loading a state dict changes them: `train()` does
    not reach the layer. γ and β are parameters that want no gradient, so that an optimizer leaves them alone, weight
    decay included; with `layer.requires_grad_()` they are trained. The gradient goes to the input (and the residual)
    alone. One class serves (N, C) and (N, C, *S).

    It loads the checkpoints of PyTorch's batch norms, and of the `FrozenBatchNorm2d` of torchvision and of detectron2,
    which have no num_batches_tracked; its own state dict is that of PyTorch's layers. (Before version 3 of its layer,
    detectron2 had ε in running_var already; like detectron2 today, this layer takes such numbers as they are. Subtract
    ε yourself if you have such a file.)

    `batchnorm.freeze` freezes layers that are there already, `batchnorm.convert(model, "frozen")` makes them layers of
    this class, and `batchnorm.unfreeze` makes trained layers of them.

    Wrong to use in training from scratch, where there are no statistics yet: the identity is all that it is then.

    Args:
        num_features: C, the channels of the input.
        eps: ε, added to the variance.
        device: where parameters and buffers live.
        dtype: of parameters and buffers.
        activation: None, "relu", "relu6", "leaky_relu", "silu", "hardswish" or "gelu".
        negative_slope: slope of leaky_relu below 0.
        backend: None for the best one, or one that `batchnorm.explain_backend` lists.

    Shape:
        input and `residual`: (N, C) or (N, C, *S). `mask`: (N, *S), or what broadcasts to it. Output: the input's.

    Raises:
        InputError: shapes or options that do not fit.
        InputTypeError: integer or complex input.

    Source:
        He et al., Deep Residual Learning, 2016, arXiv:1512.03385, appendix A: "the BN layers are fixed".

    Example:
        >>> import torch, batchnorm
        >>> layer = batchnorm.FrozenBatchNorm(2).train()
        >>> missing = layer.load_state_dict(
        ...     {
        ...         "weight": torch.tensor([1.0, 2.0]),
        ...         "bias": torch.tensor([0.0, 1.0]),
        ...         "running_mean": torch.tensor([1.0, 0.0]),
        ...         "running_var": torch.tensor([1.0, 4.0]),
        ...     }
        ... )
        >>> layer(torch.tensor([[3.0, 6.0]])).detach().round(decimals=3)
        tensor([[2., 7.]])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        activation: str | None = None,
        negative_slope: float = 0.01,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            device=device,
            dtype=dtype,
            activation=activation,
            negative_slope=negative_slope,
            backend=backend,
        )
        self.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Make the layer the identity again, statistics included: what memory from the meta device needs."""
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.zero_()
        super().reset_parameters()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: Any) -> None:
        # PyTorch's loader fills the counter in below version 2 alone; detectron2 calls its layer, without one, 3.
        key, counter = f"{prefix}num_batches_tracked", self.num_batches_tracked
        if key not in state_dict and counter is not None:
            state_dict[key] = torch.zeros_like(counter, device="cpu") if counter.is_meta else counter
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """PyTorch's text without what means nothing here, and every extra that is not at its default."""
        text = super().extra_repr()
        return text.replace(f", momentum={self.momentum}", "").replace(", track_running_stats=True", "")


register(Family("frozen", dict.fromkeys((1, 2, 3), FrozenBatchNorm)))
