"""WhitenedBatchNorm: batch normalization that decorrelates, by eigenvectors (DBN) or Newton's iteration (IterNorm)."""

import math
import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from batchnorm._activations import activation_named
from batchnorm._errors import InputError, InputTypeError, message
from batchnorm._validation import SINGLE, Single, check_call
from batchnorm.nn._unscriptable import Unscriptable
from batchnorm.nn.batch_norm import NonFinite
from batchnorm.ops import is_recomputation, is_traced
from batchnorm.ops.composed import finish
from batchnorm.ops.whitening import Whitening, update_running_, whiten, whiten_by

__all__ = ["WhitenedBatchNorm"]

Method = Literal["zca", "newton"]
# Of Huang et al. 2018; IterNorm was run with up to 64.
_GROUP_SIZE = 16


class WhitenedBatchNorm(Unscriptable, nn.Module):
    r"""Batch normalization that also takes out the correlations between the channels of a group.

    $$y = \mathrm{act}\left(\gamma \odot W\,(x - \mu) + \beta + \mathrm{residual}\right), \qquad
    W = (\Sigma + \varepsilon I)^{-1/2}$$

    μ and Σ are mean and covariance of `group_size` consecutive channels over N and all positions. With a group of
    one channel this is batch norm. Of all matrices that whiten, this symmetric one (ZCA) changes x least, and does
    not turn from batch to batch as principal axes do. Gradients go through μ and W.

    - `method="zca"` takes the inverse root by eigenvectors, exactly. Its gradient is finite at equal eigenvalues, where
      that of `torch.linalg.eigh` is not, and can be differentiated again.
    - `method="newton"` takes `iterations` steps of Newton's iteration on Σ / trace: products only. Directions with
      eigenvalues far below the trace are whitened in part, which is what keeps it calm where the batch says little of
      them: more iterations come closer to ZCA.

    For networks whose channels are strongly correlated, where it conditions the optimization better than the scaling
    of batch norm alone; for whitening features (self-supervised learning, where it keeps them from collapsing).

    Wrong to use where a batch holds few values per channel beside `group_size`. With g + 1 values or fewer every
    batch, whitened exactly, is the same simplex: nothing but a rotation is left of the input (a warning says so).
    With 10·g values of white noise the eigenvalues of Σ still reach from 0.5 to 1.7. Wrong, too, where its price
    matters: the products take O(N·S·C·g), those for Σ in float64, the root O(C·g²). A training step of 32 × 64 × 28²
    on one CPU thread takes 4 to 5 times that of `BatchNorm2d` with a group size of 16, and 7 times with 64.

    In eval the running statistics are used. IterNorm averages W; this layer averages the covariance, of which W is
    computed in every eval call (0.1 ms for 64 channels, 2 ms for 2048, so nothing is cached that could go stale). The
    mean of Σ^{-1/2} over batches is not that of the data: small batches make it too large, by Jensen's inequality. The
    mean of unbiased covariances is right for batches of every size, and ε or the method can be changed afterwards.

    It is no `torch.nn.modules.batchnorm._BatchNorm`, because tools that ask for one take `running_var` for all there
    is to the statistics: `fold`, `fuse`, `freeze`, `recalibrate`, `convert` and PyTorch's `update_bn` leave it alone;
    `merge_statistics` averages its buffers like weights, without the scatter of the means. To freeze it, call
    `eval()` on it and set `requires_grad`. Statistics are those of each process: nothing is exchanged under
    DistributedDataParallel.

    Its state dict has `running_cov` in place of `running_var`. A checkpoint of a plain batch norm loads: its
    `running_var` becomes the diagonal, and eval with "zca" is then that batch norm's. The other way is refused by
    `load_state_dict`.

    Args:
        num_features: C, the channels of the input.
        eps: ε, added to the diagonal of Σ.
        momentum: weight of the new batch in the running statistics; None for the plain average over all batches.
        affine: learn γ (`weight`) and β (`bias`), one a channel.
        track_running_stats: keep running statistics; without them eval uses the batch's, too.
        device: where parameters and buffers live.
        dtype: of parameters and buffers.
        method: "zca" or "newton".
        group_size: g, the channels that are whitened together, a divisor of C; None for 16, or C if that is smaller.
        iterations: Newton's steps.
        bias: learn β; without it β is 0.
        activation: None, "relu", "relu6", "leaky_relu", "silu", "hardswish" or "gelu".
        negative_slope: slope of leaky_relu below 0.
        nonfinite: with "skip", a group whose batch statistics are NaN or infinite leaves its running statistics alone;
            with "propagate" one bad batch poisons them for good.
        single: what training does with one value per channel: "error", "running" or "zero", as in `batch_norm`.

    Shape:
        input and `residual`: (N, C, *S). `mask`: (N, *S), or what broadcasts to it: True, or a weight taken as a
        frequency, where the input is valid. Output: the input's, and 0 where the mask is. `running_mean`: (C,);
        `running_cov`: (C / g, g, g), with the unbiased covariances (Σ of the batch times n / (n − 1)).

    Raises:
        InputError: shapes or options that do not fit, or one value per channel in training.
        InputTypeError: integer or complex input, or an option of another type.

    Source:
        Huang et al., Decorrelated Batch Normalization, 2018, arXiv:1804.08450 ("zca"); Huang et al., Iterative
        Normalization: Beyond Standardization towards Efficient Whitening, 2019, arXiv:1904.03441 ("newton").

    Example:
        >>> import torch, batchnorm
        >>> layer = batchnorm.WhitenedBatchNorm(2, affine=False)
        >>> shared = torch.randn(500, 1)
        >>> x = torch.cat([shared, shared + 0.1 * torch.randn(500, 1)], 1)
        >>> round(x.T.corrcoef()[0, 1].item(), 1), abs(round(layer(x).T.corrcoef()[0, 1].item(), 1))
        (1.0, 0.0)
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_cov: Tensor | None
    num_batches_tracked: Tensor | None

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
        method: Method = "zca",
        group_size: int | None = None,
        iterations: int = 5,
        bias: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
        nonfinite: NonFinite = "propagate",
        single: Single = "error",
    ) -> None:
        super().__init__()
        _check_options(num_features, eps, momentum, method, iterations)
        activation_named(activation)
        _check_choice("nonfinite", nonfinite, get_args(NonFinite))
        _check_choice("single", single, SINGLE)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.method: Method = method
        self.group_size = _checked_size(num_features, group_size)
        self.iterations = iterations
        self.activation = activation
        self.negative_slope = negative_slope
        self.nonfinite: NonFinite = nonfinite
        self.single: Single = single
        keywords: Any = {"device": device, "dtype": dtype}
        for name, wanted in (("weight", affine), ("bias", affine and bias)):
            value = nn.Parameter(torch.empty(num_features, **keywords)) if wanted else None
            self.register_parameter(name, value)
        size, tracked = self.group_size, track_running_stats
        covariance = (num_features // size, size, size)
        self.register_buffer("running_mean", torch.empty(num_features, **keywords) if tracked else None)
        self.register_buffer("running_cov", torch.empty(covariance, **keywords) if tracked else None)
        counter = torch.tensor(0, dtype=torch.long, device=device) if tracked else None
        self.register_buffer("num_batches_tracked", counter)
        self.reset_parameters()
        # torch.fx takes a module for a leaf by this attribute: traced into, it would keep the mode that it has now.
        self.__dict__["__module__"] = nn.BatchNorm1d.__module__

    def reset_running_stats(self) -> None:
        """Mean 0 and covariance the identity, as before the first batch."""
        if self.running_mean is not None and self.running_cov is not None:
            self.running_mean.zero_()
            identity = torch.eye(
                self.group_size, dtype=self.running_cov.dtype, device=self.running_cov.device
            )
            self.running_cov.copy_(identity.expand_as(self.running_cov))
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """γ = 1 and β = 0, and the running statistics anew."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """y = act(γ·W(input − μ) + β + residual); see the class."""
        training, tracking = self.training, self.track_running_stats
        used = not training or tracking
        mean, covariance = (self.running_mean, self.running_cov) if used else (None, None)
        mask, training = check_call(
            input,
            residual,
            mask,
            training or mean is None,
            self.single,
            weight=self.weight,
            bias=self.bias,
            running_mean=mean,
        )
        if input.shape[1] != self.num_features:
            raise _wrong_channels(input, self.num_features)
        iterations = self.iterations if self.method == "newton" else None
        groups = self.num_features // self.group_size
        with torch.autocast(input.device.type, enabled=False):
            whitening = Whitening(groups, self.eps, iterations, self.weight, self.bias)
            if training or mean is None or covariance is None:
                if not is_traced(input):
                    _warn_of_few(input, self.group_size)
                z, *found = whiten(input, mask, whitening)
                if mean is not None and covariance is not None and not is_recomputation():
                    self._update(mean, covariance, *found)
            else:
                z = whiten_by(input, mask, mean, covariance, whitening)
            return finish(z, input, residual, mask, self.activation, self.negative_slope)

    def _update(self, mean: Tensor, covariance: Tensor, *found: Tensor) -> None:
        counter = self.num_batches_tracked
        if counter is not None:
            counter.add_(1)
        with torch.no_grad():
            update_running_(
                mean,
                covariance,
                counter,
                self.momentum,
                *(each.detach() for each in found),
                skip_nonfinite=self.nonfinite == "skip",
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any, **keywords: Any
    ) -> None:
        """A plain batch norm's running_var is the diagonal of the covariance."""
        variance = state_dict.get(f"{prefix}running_var")
        if self.running_cov is not None and variance is not None and f"{prefix}running_cov" not in state_dict:
            del state_dict[f"{prefix}running_var"]
            if variance.shape == (self.num_features,):
                variance = torch.diag_embed(variance.reshape(-1, self.group_size))
            state_dict[f"{prefix}running_cov"] = variance
        super()._load_from_state_dict(state_dict, prefix, *arguments, **keywords)

    def extra_repr(self) -> str:
        """The arguments, and every extra that is not at its default."""
        text = (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, method={self.method}, group_size={self.group_size}"
        )
        if self.method == "newton":
            text += f", iterations={self.iterations}"
        if self.affine and self.bias is None:
            text += ", bias=False"
        if self.activation is not None:
            text += f", activation={self.activation}"
        if self.activation == "leaky_relu":
            text += f", negative_slope={self.negative_slope}"
        if self.nonfinite != "propagate":
            text += f", nonfinite={self.nonfinite}"
        if self.single != "error":
            text += f", single={self.single}"
        return text


def _check_number(name: str, value: object, whole: bool = False) -> None:
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds):
        wanted = "an integer" if whole else "a number"
        raise InputTypeError(message(name, got=type(value).__name__, expected=wanted))


def _check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(message(name, got=repr(value), expected=f"one of {', '.join(map(repr, known))}"))


def _check_options(
    num_features: int, eps: float, momentum: float | None, method: str, iterations: int
) -> None:
    for name, count in (("num_features", num_features), ("iterations", iterations)):
        _check_number(name, count, whole=True)
        if count < 1:
            raise InputError(message(name, got=count, expected="at least 1"))
    _check_number("eps", eps)
    if not 0 < eps < math.inf:
        raise InputError(message("eps", got=eps, expected="a number above 0"))
    if momentum is not None:
        _check_number("momentum", momentum)
        if not 0 <= momentum <= 1:
            raise InputError(message("momentum", got=momentum, expected="a number from 0 to 1, or None"))
    _check_choice("method", method, get_args(Method))


def _checked_size(channels: int, size: int | None) -> int:
    """The size of a group, a divisor of the channels."""
    wanted = min(channels, _GROUP_SIZE) if size is None else size
    _check_number("group_size", wanted, whole=True)
    if wanted < 1 or channels % wanted:
        divisors = ", ".join(str(each) for each in range(1, channels + 1) if channels % each == 0)
        raise InputError(
            message(
                "group_size" if size is not None else "group_size=None, which is 16,",
                got=f"{wanted} for {channels} channels",
                expected="a divisor of num_features",
                fix=f"Choose among {divisors}.",
            )
        )
    return wanted


def _wrong_channels(input: Tensor, channels: int) -> InputError:
    return InputError(
        message(
            "channels of the input",
            got=f"{input.shape[1]} in shape {tuple(input.shape)}",
            expected=channels,
            fix=f"Make the layer with num_features={input.shape[1]}, or put the channels on axis 1.",
        )
    )


def _warn_of_few(input: Tensor, size: int) -> None:
    values = input.shape[0] * input.shape[2:].numel()
    if size > 1 and 1 < values <= size + 1:
        warnings.warn(
            f"WhitenedBatchNorm: {values} values per channel for groups of {size} channels. Whitened, any such batch "
            "is the same up to a rotation: use larger batches or a smaller group_size.",
            stacklevel=3,
        )
