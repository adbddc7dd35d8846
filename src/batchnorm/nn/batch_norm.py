"""BatchNorm1d, 2d and 3d."""

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import Module

from batchnorm import ops
from batchnorm._activations import activation_named
from batchnorm._errors import InputError, ModelError, message
from batchnorm._validation import SINGLE, Single
from batchnorm.functional import layer_batch_norm
from batchnorm.nn._unscriptable import Unscriptable

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "Extras", "Memory", "NonFinite", "Sized"]

# torch.fx looks the wrapped function up in the module that calls it.
torch.fx.wrap("layer_batch_norm")

if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm as _Base
else:
    _Base = object

NonFinite = Literal["propagate", "skip"]
Memory = Literal["keep", "recompute"]


def _own(held: Mapping[str, Tensor | None], name: str, module: Module) -> Tensor | None:
    """A parameter or buffer straight from the module's dictionary, if it is there: as an attribute it costs 0.5 µs."""
    try:
        return held[name]
    except KeyError:
        return getattr(module, name)  # type: ignore[no-any-return]


class Extras(Unscriptable, _Base):
    """What every layer of ours has beyond PyTorch's: an activation, a residual, a mask, a rule for bad batches.

    It stands before PyTorch's class among the bases, so that `isinstance` holds for both.
    """

    _dimensions: ClassVar[tuple[int, ...] | None]
    # What tools have to know of a layer: its parameters that are γ and β, and the place of the mask in its forward.
    _affine_names: ClassVar[tuple[str, ...]] = ("weight", "bias")
    _mask_place: ClassVar[int] = 2
    _checks_itself: ClassVar[bool] = False
    # Attributes that belong to the class alone: gone when a layer gets another one.
    _transient: ClassVar[tuple[str, ...]] = ()
    # Whether it computes what PyTorch's layer of the same numbers does, activation aside.
    _is_plain: ClassVar[bool] = True
    # Class-level, so that a layer made by other means (an old pickle, a changed __class__) has them.
    activation: str | None = None
    negative_slope: float = 0.01
    nonfinite: NonFinite = "propagate"
    backend: str | None = None
    single: Single = "error"
    # Set by `batchnorm.fuse`: whether backward keeps the output or computes it again.
    memory: Memory = "keep"

    def __init_subclass__(cls, **keywords: Any) -> None:
        # PyTorch's own hook for other ranks: a subclass that overrides it decides what it takes.
        cls._checks_itself = cls._checks_itself or "_check_input_dim" in cls.__dict__
        super().__init_subclass__(**keywords)

    def _set_extras(
        self,
        activation: str | None,
        negative_slope: float,
        nonfinite: NonFinite,
        backend: str | None,
        single: Single,
    ) -> None:
        activation_named(activation)
        ops.check_name(backend)
        if nonfinite not in ("propagate", "skip"):
            raise InputError(message("nonfinite", got=repr(nonfinite), expected="'propagate' or 'skip'"))
        if single not in SINGLE:
            raise InputError(
                message("single", got=repr(single), expected=f"one of {', '.join(map(repr, SINGLE))}")
            )
        self.activation = activation
        self.negative_slope = negative_slope
        self.nonfinite = nonfinite
        self.backend = backend
        self.single = single
        # torch.fx takes a module for a leaf by this attribute. Traced into, the layer would keep the mode that it had
        # when it was traced; pickle looks at the class.
        self.__dict__["__module__"] = torch.nn.BatchNorm1d.__module__

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        inplace: bool = False,
    ) -> Tensor:
        """y = act(batch norm(input) + residual); see the class. `inplace`, for inference: y in the input's memory."""
        if self._checks_itself:
            self._check_input_dim(input)  # type: ignore[no-untyped-call]
        training, tracking = self.training, self.track_running_stats
        parameters, buffers = self._parameters, self._buffers
        running_mean = running_var = counter = None
        if not training or tracking:
            running_mean = _own(buffers, "running_mean", self)
            running_var = _own(buffers, "running_var", self)
        if training and tracking:
            counter = _own(buffers, "num_batches_tracked", self)
        return layer_batch_norm(
            input,
            running_mean,
            running_var,
            counter,
            _own(parameters, "weight", self),
            _own(parameters, "bias", self),
            training or (running_mean is None and running_var is None),
            self.momentum,
            self.eps,
            self.activation,
            self.negative_slope,
            residual,
            mask,
            self.nonfinite == "skip",
            self.backend,
            None if self._checks_itself else self._dimensions,
            inplace,
            self.memory == "recompute",
            self.single,
            self._policy() if training else None,
        )

    def _policy(self) -> ops.Policy | None:
        """What stands between the batch's statistics and their use in training; None for plain batch norm."""
        return None

    def extra_repr(self) -> str:
        """PyTorch's text, and every extra that is not at its default."""
        text: str = super().extra_repr()  # type: ignore[no-untyped-call]
        if self.activation is not None:
            text += f", activation={self.activation}"
        if self.activation == "leaky_relu":
            text += f", negative_slope={self.negative_slope}"
        if self.nonfinite != "propagate":
            text += f", nonfinite={self.nonfinite}"
        if self.single != "error":
            text += f", single={self.single}"
        if self.backend is not None:
            text += f", backend={self.backend}"
        if self.memory != "keep":
            text += f", memory={self.memory}"
        return text

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """The layer's children; refuses torch.nn.SyncBatchNorm.convert_sync_batchnorm where it would lose something."""
        # torch.nn.SyncBatchNorm.convert_sync_batchnorm builds a new layer from the few attributes that it knows and
        # would drop the rest without a word. It asks a layer for its children last: the one place to refuse.
        if (self.activation is not None or not self._is_plain) and (
            sys._getframe(1).f_code.co_name == "convert_sync_batchnorm"
        ):
            name = type(self).__name__
            lost = (
                f"the activation {self.activation!r} of a {name}" if self._is_plain else f"what a {name} does"
            )
            raise ModelError(
                f"convert_sync_batchnorm would drop {lost}({self.num_features}): use "
                "batchnorm.convert(model, 'sync'), which keeps an activation, or convert the layers to "
                "torch.nn's first."
            )
        children: Iterator[tuple[str, Module]] = super().named_children()
        return children


class Sized(Extras):
    """The constructor of a layer that knows its number of channels."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
        nonfinite: NonFinite = "propagate",
        single: Single = "error",
        backend: str | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:  # a keyword of PyTorch's own constructor from 2.13 on alone
            self.register_parameter("bias", None)
        self._set_extras(activation, negative_slope, nonfinite, backend, single)


class BatchNorm1d(Sized, torch.nn.BatchNorm1d):
    r"""Batch normalization of (N, C) or (N, C, L) input, with an activation, a residual and a mask if you like.

    $$y = \mathrm{act}\left(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \varepsilon}} \cdot \gamma + \beta +
    \mathrm{residual}\right)$$

    In training, mean and biased variance are the batch's, per channel, and the running statistics move by
    `momentum` towards the batch's mean and unbiased variance; in eval the running statistics are used. Constructor,
    defaults, buffers, `state_dict` and errors are those of `torch.nn.BatchNorm1d`.

    A forward that is computed again in a backward pass, as by `torch.utils.checkpoint`, gives the same bits and counts
    once, where PyTorch's layers move their running statistics a second time. A first forward inside a backward pass (a
    loss in a gradient's hook) cannot be told from that and does not count either; a checkpoint around a module that
    `torch.compile` has compiled still counts twice, and one inside of what is compiled once.

    Wrong to use where a batch holds only a few values per channel (the statistics are noise), or where the batches
    of training and of use come from different distributions.

    Args:
        num_features: C, the channels of the input.
        eps: ε, added to the variance.
        momentum: weight of the new batch in the running statistics; None for the plain average over all batches.
        affine: learn γ (`weight`) and β (`bias`).
        track_running_stats: keep running statistics; without them eval uses the batch's, too.
        device: where parameters and buffers live.
        dtype: of parameters and buffers.
        bias: learn β; without it β is 0.
        activation: None, "relu", "relu6", "leaky_relu", "silu", "hardswish" or "gelu".
        negative_slope: slope of leaky_relu below 0.
        nonfinite: with "skip", a channel whose batch statistics are NaN or infinite leaves its running statistics
            alone; "propagate" is PyTorch's behaviour, in which one bad batch poisons them for good.
        single: what training does with one value per channel: "error" (PyTorch's), "running" (the running statistics,
            which stay), or "zero" (a variance of 0, so that x̂ is 0); see `batch_norm`.
        backend: None for the best one, or one that `batchnorm.explain_backend` lists.

    Shape:
        input and `residual`: (N, C) or (N, C, L). `mask`: (N,) or (N, L), or what broadcasts to it: True, or a
        weight taken as a frequency, where the input is valid. Output: the input's, and 0 where the mask is. With
        `layer(input, inplace=True)` it is the input's memory, too: in eval mode, where no gradient is wanted.

    Raises:
        InputError: shapes or options that do not fit, or one value per channel in training.
        InputTypeError: integer or complex input.

    Source:
        Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167.

    Example:
        >>> import torch, batchnorm
        >>> layer = batchnorm.BatchNorm1d(3, activation="relu")
        >>> layer(torch.randn(8, 3, 20), mask=torch.arange(20) < 15)[:, :, 15:].abs().max().item()
        0.0
    """

    _dimensions = (2, 3)


class BatchNorm2d(Sized, torch.nn.BatchNorm2d):
    r"""Batch normalization of (N, C, H, W) input, with an activation, a residual and a mask if you like.

    The formula, the arguments and the errors are those of `BatchNorm1d`; the mean and the variance are over N, H
    and W. Constructor, defaults, buffers, `state_dict` and errors are those of `torch.nn.BatchNorm2d`.

    Shape:
        input and `residual`: (N, C, H, W). `mask`: (N, H, W), or what broadcasts to it. Output: the input's.

    Example:
        >>> import torch, batchnorm
        >>> layer = batchnorm.BatchNorm2d(3, activation="relu")
        >>> x = torch.randn(8, 3, 6, 6)
        >>> layer(x, residual=x).shape
        torch.Size([8, 3, 6, 6])
    """

    _dimensions = (4,)


class BatchNorm3d(Sized, torch.nn.BatchNorm3d):
    r"""Batch normalization of (N, C, D, H, W) input, with an activation, a residual and a mask if you like.

    The formula, the arguments and the errors are those of `BatchNorm1d`; the mean and the variance are over N, D, H
    and W. Constructor, defaults, buffers, `state_dict` and errors are those of `torch.nn.BatchNorm3d`.

    Shape:
        input and `residual`: (N, C, D, H, W). `mask`: (N, D, H, W), or what broadcasts to it. Output: the input's.

    Example:
        >>> import torch, batchnorm
        >>> batchnorm.BatchNorm3d(2)(torch.randn(4, 2, 3, 3, 3)).shape
        torch.Size([4, 2, 3, 3, 3])
    """

    _dimensions = (5,)
