"""BatchRenorm: batch norm for small or dependent batches, and for reinforcement learning."""

import itertools
import math
from collections.abc import Sequence

import torch

from batchnorm import ops
from batchnorm._errors import InputError, InputTypeError, message
from batchnorm._validation import Single
from batchnorm.nn.batch_norm import NonFinite
from batchnorm.nn.families import Family, register
from batchnorm.nn.member import Member
from batchnorm.policies.renorm import Knots, Renorm

__all__ = ["BatchRenorm"]

Bound = float | Sequence[tuple[int, float]]


class BatchRenorm(Member):
    r"""Batch renormalization: in training, too, the running statistics are what an output is measured by.

    $$y = \left(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \varepsilon}} \cdot r + d\right) \cdot \gamma + \beta
    \qquad r = \mathrm{clip}_{[1/r_\mathrm{max},\, r_\mathrm{max}]}\frac{\sigma_\mathrm{batch}}{\sigma} \qquad
    d = \mathrm{clip}_{[-d_\mathrm{max},\, d_\mathrm{max}]}\frac{\mathrm{E}[x] - \mu}{\sigma}$$

    with the running mean μ and σ = √(running_var + ε), and σ_batch = √(Var[x] + ε). Where nothing is clipped, y is what
    eval would give, so that training and eval agree. r and d are constants for the gradient, which flows through the
    statistics of the batch as in batch norm. With r_max = 1 and d_max = 0 it is batch norm.

    Use it where batches are small or their samples depend on one another, and in reinforcement learning, where batches
    of two policies meet (CrossQ). Wrong to use where batches are large and independent (it is batch norm there, and
    slower), and from the first batch on without a warm-up or a schedule: the running statistics are 0 and 1 then.

    Args:
        num_features: C, the channels of the input.
        eps: ε, added to the variance.
        momentum: weight of the new batch in the running statistics. They must follow the network: 0.01 or more.
        affine: learn γ (`weight`) and β (`bias`).
        track_running_stats: must be True.
        device: where parameters and buffers live.
        dtype: of parameters and buffers.
        r_max: how far σ may be corrected, at least 1: a number, or pairs (batch, number) in the order of the batches,
            linear between them and constant before and behind. The paper's schedule if not given.
        d_max: how far the mean may be corrected, in σ, at least 0; a number or pairs, as `r_max`.
        warmup: so many batches are plain batch norm, whatever the bounds say. Batches are counted by
            `num_batches_tracked`, which a state dict brings along.
        bias: learn β; without it β is 0.
        activation: None, "relu", "relu6", "leaky_relu", "silu", "hardswish" or "gelu".
        negative_slope: slope of leaky_relu below 0.
        nonfinite: as in `BatchNorm1d`.
        single: what training does with one value per channel, as in `BatchNorm1d`.
        backend: None for the best one, or one that `batchnorm.explain_backend` lists.

    Shape:
        input and `residual`: (N, C) or (N, C, *S), S of any number of axes. `mask`: (N, *S), or what broadcasts to it.
        Output: the input's.

    Raises:
        InputError: bounds that no layer can work with, a negative `warmup`, or no running statistics; and what
            `BatchNorm1d` raises.
        InputTypeError: bounds that are neither numbers nor pairs; and what `BatchNorm1d` raises.

    Source:
        Ioffe, Batch Renormalization, 2017, arXiv:1702.03275. Bhatt et al., CrossQ, ICLR 2024, arXiv:1902.05605.

    Example:
        >>> import torch, batchnorm
        >>> layer = batchnorm.BatchRenorm(3, r_max=3, d_max=5, warmup=1)
        >>> x = torch.randn(64, 3)
        >>> for _ in range(200): y = layer(x)
        >>> torch.allclose(y, layer.eval()(x), atol=1e-4)
        True
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
        r_max: Bound = ((5_000, 1.0), (40_000, 3.0)),
        d_max: Bound = ((5_000, 0.0), (25_000, 5.0)),
        warmup: int = 0,
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
        if not track_running_stats:
            raise InputError(
                message(
                    "BatchRenorm",
                    got="track_running_stats=False",
                    expected="running statistics, which it corrects towards",
                )
            )
        if isinstance(warmup, bool) or not isinstance(warmup, int):
            raise InputTypeError(
                message("BatchRenorm: warmup", got=type(warmup).__name__, expected="a number of batches")
            )
        if warmup < 0:
            raise InputError(message("BatchRenorm: warmup", got=warmup, expected="at least 0"))
        self.r_max, self.d_max = r_max, d_max
        self._bounds()
        self.warmup = warmup

    def _bounds(self) -> tuple[Knots, Knots]:
        """The bounds as they are now, checked: they may be set to others during training."""
        return _knots("r_max", self.r_max, 1.0), _knots("d_max", self.d_max, 0.0)

    def _policy(self) -> ops.Policy | None:
        mean, var, tracked = self.running_mean, self.running_var, self.num_batches_tracked
        if mean is None or var is None or tracked is None or not self.track_running_stats:
            raise InputError(
                message(
                    "BatchRenorm in training",
                    got="no running statistics, or track_running_stats=False",
                    expected="running_mean, running_var and num_batches_tracked, as it was made with",
                )
            )
        return Renorm(mean, var, tracked, *self._bounds(), self.warmup)

    def extra_repr(self) -> str:
        """The batch norm's text, and the bounds."""
        r_max, d_max = map(_short, self._bounds())
        return (
            f"{super().extra_repr()}, r_max={r_max}, d_max={d_max}"
            f"{f', warmup={self.warmup}' if self.warmup else ''}"
        )


def _short(knots: Knots) -> str:
    if len(knots) == 1:
        return f"{knots[0][1]:g}"
    return " to ".join(f"{value:g} at batch {step}" for step, value in knots)


def _knots(name: str, bound: Bound, least: float) -> Knots:
    """A number or pairs, checked, as pairs."""
    expected = f"a number of at least {least:g}, or a list of pairs (batch, number) with rising batches"
    pairs: Sequence[tuple[int, float]] = [(0, bound)] if isinstance(bound, int | float) else bound
    try:
        knots = tuple((int(step), float(value)) for step, value in pairs)
    except (TypeError, ValueError) as error:
        raise InputTypeError(message(f"BatchRenorm: {name}", got=repr(bound), expected=expected)) from error
    steps = [step for step, _ in knots]
    rising = all(a < b for a, b in itertools.pairwise(steps)) and min(steps, default=-1) >= 0
    if not rising or not all(least <= value < math.inf for _, value in knots):
        raise InputError(message(f"BatchRenorm: {name}", got=repr(bound), expected=expected))
    return knots


register(Family("renorm", dict.fromkeys((1, 2, 3), BatchRenorm)))
