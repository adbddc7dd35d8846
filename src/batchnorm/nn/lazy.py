"""LazyBatchNorm1d, 2d and 3d: the number of channels is that of the first input."""

import inspect
from typing import Any

import torch

from batchnorm._errors import InputError, message
from batchnorm._validation import Single
from batchnorm.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, Extras, NonFinite

__all__ = ["LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d"]


class _Lazy(Extras):
    """The constructor of a layer that learns its number of channels from its first input."""

    def __init__(
        self,
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
        keywords: dict[str, Any] = {}
        if not bias:
            if "bias" not in inspect.signature(torch.nn.LazyBatchNorm1d.__init__).parameters:
                raise InputError(
                    message(
                        "bias=False of a lazy layer",
                        got=f"torch {torch.__version__}",
                        expected="torch 2.13 or later",
                        fix="Use the layer that is not lazy.",
                    )
                )
            keywords["bias"] = False
        arguments: Any = (eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(*arguments, **keywords)
        self._set_extras(activation, negative_slope, nonfinite, backend, single)


class LazyBatchNorm1d(_Lazy, torch.nn.LazyBatchNorm1d):
    """`BatchNorm1d` whose `num_features` is the second axis of the first input.

    Arguments, shapes and errors are those of `BatchNorm1d`, without `num_features`.

    Example:
        >>> import torch, batchnorm
        >>> layer = batchnorm.LazyBatchNorm1d(activation="relu")
        >>> layer(torch.randn(4, 3)).shape, type(layer).__name__
        (torch.Size([4, 3]), 'BatchNorm1d')
    """

    cls_to_become = BatchNorm1d
    _dimensions = (2, 3)


class LazyBatchNorm2d(_Lazy, torch.nn.LazyBatchNorm2d):
    """`BatchNorm2d` whose `num_features` is the second axis of the first input.

    Arguments, shapes and errors are those of `BatchNorm2d`, without `num_features`.

    Example:
        >>> import torch, batchnorm
        >>> layer = batchnorm.LazyBatchNorm2d()
        >>> layer(torch.randn(4, 3, 2, 2)).shape, layer.num_features
        (torch.Size([4, 3, 2, 2]), 3)
    """

    cls_to_become = BatchNorm2d
    _dimensions = (4,)


class LazyBatchNorm3d(_Lazy, torch.nn.LazyBatchNorm3d):
    """`BatchNorm3d` whose `num_features` is the second axis of the first input.

    Arguments, shapes and errors are those of `BatchNorm3d`, without `num_features`.

    Example:
        >>> import torch, batchnorm
        >>> batchnorm.LazyBatchNorm3d()(torch.randn(4, 3, 2, 2, 2)).shape
        torch.Size([4, 3, 2, 2, 2])
    """

    cls_to_become = BatchNorm3d
    _dimensions = (5,)
