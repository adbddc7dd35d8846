"""VirtualBatchNorm, and `reference_batch`, in which a network is shown what to normalize by."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm._errors import InputError, InputTypeError, ModelError, message
from batchnorm._validation import check_call
from batchnorm.nn.families import Family, register
from batchnorm.nn.frozen import Frozen
from batchnorm.nn.member import Member
from batchnorm.ops import is_traced
from batchnorm.ops.composed import finish, statistics_dtype
from batchnorm.ops.virtual import Reference, by_own, by_reference, kept_once

__all__ = ["VirtualBatchNorm", "reference_batch"]


class _Held:
    """A reference with its graph. It stays behind when the layer is copied or pickled: the buffers have its numbers."""

    def __init__(self, reference: Reference | None = None) -> None:
        self.reference = reference

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Held, ())


class VirtualBatchNorm(Member):
    r"""Batch normalization by a reference batch and the sample itself, so that samples do not depend on one another.

    $$y = \mathrm{act}\left(\frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}} \cdot \gamma + \beta +
    \mathrm{residual}\right), \qquad \mu = \frac{k\,\mu_r + \mu_x}{k + 1}, \qquad
    \sigma^2 = \frac{k\,\sigma_r^2 + \sigma_x^2}{k + 1} + \frac{k\,(\mu_x - \mu_r)^2}{(k + 1)^2}$$

    μ_r and σ_r² are those of a reference batch of k samples, chosen once and kept; μ_x and σ_x² are those of the sample
    over its positions. So a sample counts as one more of the reference batch, and nothing else in its batch matters:
    made for the generators of GANs, where batch norm lets the samples of a batch resemble one another.

    The reference batch goes through the network with its present weights, and every layer notes its own statistics:

        with batchnorm.reference_batch(model):
            model(reference)
        model(x)

    In that pass a layer is plain batch norm. The statistics keep their graph, as in the paper: a loss of `model(x)` has
    gradients through them. So run the reference again before each training step. Training and eval are the same; before
    eval run it once more under `torch.no_grad()`, for the weights have moved. The statistics are saved:
    `running_mean` and `running_var` (biased) are the reference's, `num_batches_tracked` is k, and 0 says that there
    is none. So the checkpoint of a plain batch norm loads as a reference that weighs as many samples as it has seen
    batches. `momentum`, `nonfinite`, `single` and `backend` of a converted layer mean nothing here.

    Wrong to use where its price is too high: every training step is that of two batches. Wrong, too, for a reference
    that is not like the data, and with activation checkpointing, which would run parts of the reference pass again.
    A large reference makes it the frozen batch norm of `freeze`, a small one makes results depend on its choice.

    `fold`, `fuse`, `recalibrate` and `remove` leave the layer alone, because it is no fixed affine map. `freeze` keeps
    its reference as it is. A layer must be called once in a reference pass, not several times at different depths.

    Args:
        num_features: C, the channels of the input.
        eps: ε, added to the variance.
        affine: learn γ (`weight`) and β (`bias`).
        device: where parameters and buffers live.
        dtype: of parameters and buffers.
        bias: learn β; without it β is 0.
        activation: None, "relu", "relu6", "leaky_relu", "silu", "hardswish" or "gelu".
        negative_slope: slope of leaky_relu below 0.

    Shape:
        input and `residual`: (N, C, *S), other positions than the reference's allowed. `mask`: (N, *S), or what
        broadcasts to it: True, or a weight taken as a frequency among the positions of its sample. A sample counts as
        one however many positions are valid, and as none without any. Output: the input's, and 0 where the mask is.

    Raises:
        InputError: shapes or options that do not fit, or a reference with one value per channel.
        InputTypeError: integer or complex input.
        ModelError: there is no reference, or the layer is called twice in one reference pass, or backward goes a
            second time through a reference pass whose graph is gone.

    Source:
        Salimans et al., Improved Techniques for Training GANs, 2016, arXiv:1606.03498, section 3.5.

    Example:
        >>> import torch, batchnorm
        >>> layer = batchnorm.VirtualBatchNorm(3, activation="relu")
        >>> with batchnorm.reference_batch(layer):
        ...     _ = layer(torch.randn(16, 3, 8, 8))
        >>> x = torch.randn(4, 3, 8, 8)
        >>> torch.allclose(layer(x)[:1], layer(x[:1]))
        True
    """

    # Class-level, so that a layer that was converted has them.
    _open = False  # inside `reference_batch`
    _graph = True
    _seen: Reference | None = None
    _held: _Held | None = None
    _transient = ("_graph", "_held", "_is_known", "_marks", "_open", "_seen")
    _marks: tuple[tuple[int, int], ...] = ()  # the buffers that `_held` is about, and their versions
    _is_known = False  # whether num_batches_tracked was found to be above 0: to look would wait for a GPU

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            affine=affine,
            device=device,
            dtype=dtype,
            bias=bias,
            activation=activation,
            negative_slope=negative_slope,
        )

    # Without `inplace`: the operators here need the input again.
    def forward(  # type: ignore[override]
        self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """y = act(virtual batch norm(input) + residual); see the class."""
        mask, _ = check_call(
            input,
            residual,
            mask,
            self._open,
            "error",
            weight=self.weight,
            bias=self.bias,
            running_mean=self.running_mean,
        )
        if self._open:
            self._check_pass(input)
            z, found = by_own(input, mask, self.weight, self.bias, self.eps)
            self._seen = found
        else:
            z = by_reference(input, mask, self._reference(input), self.weight, self.bias, self.eps)
        return finish(z, input, residual, mask, self.activation, self.negative_slope)

    def _check_pass(self, input: Tensor) -> None:
        what = f"VirtualBatchNorm({self.num_features}) in one reference pass"
        if self._seen is not None:
            raise ModelError(
                message(
                    what,
                    got="a second call",
                    expected="one: its reference is that of one batch at one depth",
                    fix="Run the whole reference as one batch, and give every depth a layer of its own.",
                )
            )
        if input.numel() == 0:
            raise InputError(message(what, got="an empty batch", expected="samples to normalize by"))

    def _reference(self, input: Tensor) -> Reference:
        if self._held is not None and self._held.reference is not None and self._is_current():
            return self._held.reference
        mean, var, counter = self.running_mean, self.running_var, self.num_batches_tracked
        if mean is None or var is None or counter is None:
            raise _without_reference(self)
        if not self._is_known and not counter.is_meta:
            if is_traced(input):
                torch._assert_async(counter > 0, "VirtualBatchNorm: no reference batch was given")
            elif counter.item() > 0:
                self._is_known = True
            else:
                raise _without_reference(self)
        wide = statistics_dtype(input)
        return Reference(mean.to(wide), var.to(wide), counter.to(wide))

    def _is_current(self) -> bool:
        """Whether what is held is what the buffers say; frozen layers and exported programs have these alone."""
        if torch.compiler.is_compiling():
            return not torch.compiler.is_exporting()
        return not isinstance(self, Frozen) and self._marks == self._mark()

    def _mark(self) -> tuple[tuple[int, int], ...]:
        buffers = (each for each in (self.running_mean, self.running_var) if each is not None)
        return tuple((id(each), 0 if each.is_inference() else each._version) for each in buffers)

    def _take(self) -> None:
        """Make what was seen in the reference pass the reference."""
        seen, self._seen = self._seen, None
        if seen is None:
            return
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                self.running_mean.copy_(seen.mean)
                self.running_var.copy_(seen.var)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.copy_(seen.samples)
        self._is_known = False
        self._held, self._marks = None, self._mark()
        if not self._graph or not seen.mean.requires_grad:
            seen = Reference(seen.mean.detach(), seen.var.detach(), seen.samples)
            if self.running_mean is None:
                self._held = _Held(seen)
        else:
            self._held = _Held(kept_once(seen))

    def _forget(self) -> None:
        self._is_known, self._held = False, None

    def reset_running_stats(self) -> None:
        """Forget the reference."""
        self._forget()
        super().reset_running_stats()

    def _apply(self, *arguments: Any, **keywords: Any) -> Any:
        # On another device, or of another dtype, the reference is what the buffers say.
        self._forget()
        return super()._apply(*arguments, **keywords)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*arguments, **keywords)

    def extra_repr(self) -> str:
        """The arguments, and every extra that is not at its default."""
        text = f"{self.num_features}, eps={self.eps}, affine={self.affine}"
        if self.activation is not None:
            text += f", activation={self.activation}"
        if self.activation == "leaky_relu":
            text += f", negative_slope={self.negative_slope}"
        return text


def _without_reference(layer: nn.Module) -> ModelError:
    return ModelError(
        message(
            repr(layer),
            got="no reference batch",
            expected="one, to normalize by",
            fix="Show it to the whole network first: with batchnorm.reference_batch(model): model(reference).",
        )
    )


@contextmanager
def reference_batch(model: nn.Module, *, graph: bool = True) -> Iterator[None]:
    """Inside the block, a call of the model shows every VirtualBatchNorm in it the batch to normalize by.

    In that call the layers normalize the batch by its own statistics, in training and in eval. When the block ends,
    the statistics become the reference of every layer that was called; if it ends with an exception, the old ones stay.

    Args:
        model: any module with `VirtualBatchNorm` layers. Frozen ones (`batchnorm.freeze`) keep the reference they have.
        graph: with autograd on, keep the graph of the statistics: gradients of later calls go through the reference
            pass, once. Its activations stay in memory until a backward, or the next reference. False takes the
            statistics for constants.

    Raises:
        InputTypeError: `model` is no module.
        ModelError: there is no VirtualBatchNorm in it, none that was called, or the block is inside another.

    Example:
        >>> import torch, batchnorm
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), batchnorm.VirtualBatchNorm(8), torch.nn.ReLU())
        >>> reference = torch.randn(16, 3, 12, 12)
        >>> with batchnorm.reference_batch(net):
        ...     _ = net(reference)
        >>> net(torch.randn(2, 3, 12, 12)).shape, net[1].num_batches_tracked.item()
        (torch.Size([2, 8, 10, 10]), 16)
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            message("reference_batch: model", got=type(model).__name__, expected="a torch.nn.Module")
        )
    what = "reference_batch: layers of the model"
    layers = [each for each in model.modules() if isinstance(each, VirtualBatchNorm)]
    if not layers:
        raise ModelError(message(what, got="no VirtualBatchNorm", expected="at least one"))
    if any(layer._open for layer in layers):
        raise ModelError(message(what, got="an open reference_batch", expected="none: one block at a time"))
    layers = [each for each in layers if not isinstance(each, Frozen)]
    for layer in layers:
        layer._open, layer._graph, layer._seen = True, graph, None
    try:
        yield
        if layers and all(layer._seen is None for layer in layers):
            raise ModelError(
                message(
                    what,
                    got="none called",
                    expected="a reference batch",
                    fix="Call the model inside the block.",
                )
            )
        for layer in layers:
            layer._take()
    finally:
        for layer in layers:
            layer._open, layer._seen = False, None


register(Family("virtual", dict.fromkeys((1, 2, 3), VirtualBatchNorm)))
