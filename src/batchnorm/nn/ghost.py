"""GhostBatchNorm: statistics of small parts of a large batch."""

import torch

from batchnorm import ops
from batchnorm._errors import InputError, InputTypeError, message
from batchnorm._validation import Single
from batchnorm.nn.batch_norm import NonFinite
from batchnorm.nn.families import Family, register
from batchnorm.nn.member import Member
from batchnorm.policies.ghost import Ghosts

__all__ = ["GhostBatchNorm"]

_SIZE = 32


class GhostBatchNorm(Member):
    r"""Batch normalization by parts of the batch, the ghosts: the regularization of small batches in a large one.

    $$y_i = \frac{x_i - \mathrm{E}_{g(i)}[x]}{\sqrt{\mathrm{Var}_{g(i)}[x] + \varepsilon}} \cdot \gamma + \beta$$

    where g(i) is the ghost of sample i: `ghost_size` consecutive samples, as in `input.split(ghost_size)`, or one of
    `splits`, as in `input.chunk(splits)`. The last ghost may be a short one; if it has one value per channel, which has
    no variance, it joins the ghost before it. The running statistics move once a batch, by the statistics of all ghosts
    merged: they are what `BatchNorm1d` would store, and eval is the same.

    Use it where a batch is large for the sake of speed and the network generalizes better with the noise of smaller
    ones, or to have the same noise for every batch size; for tables, too (TabNet). Wrong to use where a ghost holds few
    values per channel (ghosts of fewer than about 16 values are noise), where the samples of a batch are sorted (a
    ghost is consecutive samples), or where the batch is small already.

    Args:
        num_features: C, the channels of the input.
        eps: ε, added to the variance.
        momentum: weight of the new batch in the running statistics; None for the plain average over all batches.
        affine: learn γ (`weight`) and β (`bias`).
        track_running_stats: keep running statistics; without them eval uses those of the whole batch.
        device: where parameters and buffers live.
        dtype: of parameters and buffers.
        ghost_size: samples of a ghost; 32 where neither it nor `splits` is given.
        splits: the number of ghosts, instead of their size.
        bias: learn β; without it β is 0.
        activation: None, "relu", "relu6", "leaky_relu", "silu", "hardswish" or "gelu".
        negative_slope: slope of leaky_relu below 0.
        nonfinite: as in `BatchNorm1d`.
        single: what training does with one value per channel, in the batch or in every ghost, as in `BatchNorm1d`.
        backend: None for the best one, or one that `batchnorm.explain_backend` lists.

    Shape:
        input and `residual`: (N, C) or (N, C, *S), S of any number of axes. `mask`: (N, *S), or what broadcasts to it.
        Output: the input's.

    Raises:
        InputError: `ghost_size` or `splits` below 1, or both; ghosts of one value per channel, unless `single` says
            what to do with them; and what `BatchNorm1d` raises.
        InputTypeError: they are no integers; and what `BatchNorm1d` raises.

    Source:
        Hoffer, Hubara and Soudry, Train longer, generalize better, 2017, arXiv:1705.08741. (There the running
        statistics move once a ghost; here once a batch.)

    Example:
        >>> import torch, batchnorm
        >>> layer = batchnorm.GhostBatchNorm(3, ghost_size=16)
        >>> y = layer(torch.randn(64, 3, 5, 5) * 2 + 7)
        >>> y[:16].mean().abs().item() < 1e-5, y[16:32].mean().abs().item() < 1e-5
        (True, True)
    """

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
        ghost_size: int | None = None,
        splits: int | None = None,
        bias: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
        nonfinite: NonFinite = "propagate",
        single: Single = "error",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            activation=activation,
            negative_slope=negative_slope,
            nonfinite=nonfinite,
            single=single,
            backend=backend,
        )
        if ghost_size is not None and splits is not None:
            raise InputError(
                message(
                    "GhostBatchNorm",
                    got=f"ghost_size={ghost_size} and splits={splits}",
                    expected="one of them",
                )
            )
        for name, value in (("ghost_size", ghost_size), ("splits", splits)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise InputTypeError(
                    message(
                        f"GhostBatchNorm: {name}",
                        got=type(value).__name__,
                        expected="a whole number of at least 1",
                    )
                )
            if value is not None and value < 1:
                raise InputError(message(f"GhostBatchNorm: {name}", got=value, expected="at least 1"))
        self.ghost_size = _SIZE if ghost_size is None and splits is None else ghost_size
        self.splits = splits

    def _policy(self) -> ops.Policy:
        return Ghosts(self.ghost_size, self.splits)

    def extra_repr(self) -> str:
        """The batch norm's text, and how the batch is cut."""
        cut = f"splits={self.splits}" if self.ghost_size is None else f"ghost_size={self.ghost_size}"
        return f"{super().extra_repr()}, {cut}"


register(Family("ghost", dict.fromkeys((1, 2, 3), GhostBatchNorm)))
