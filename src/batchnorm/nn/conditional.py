"""ConditionalBatchNorm: γ and β of each sample by its class, or given by the caller."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter, init
from torch.nn import functional as F

from batchnorm import ops
from batchnorm._activations import activation_named
from batchnorm._errors import InputError, InputTypeError, message
from batchnorm._validation import Single, check_residual
from batchnorm.functional import layer_batch_norm
from batchnorm.nn._scopes import Scope, Told
from batchnorm.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, NonFinite
from batchnorm.nn.families import Family, Rebuilt, register
from batchnorm.nn.member import AnyBatchNorm, Member

__all__ = ["Condition", "ConditionalBatchNorm", "condition", "conditional_of", "one_class"]

# torch.fx looks the wrapped function up in the module that calls it.
torch.fx.wrap("layer_batch_norm")

Condition = Tensor | tuple[Tensor, Tensor]

_TOLD = Told("condition")
_HALF = (torch.float16, torch.bfloat16)
_INDICES = (torch.int32, torch.int64)
# What goes from a plain layer to this one and back.
_EXTRAS = ("activation", "negative_slope", "nonfinite", "single", "backend")


class ConditionalBatchNorm(Member):
    r"""Batch normalization whose γ and β are each sample's: those of its class, or what another network says.

    $$y_n = \mathrm{act}\left(\frac{x_n - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \varepsilon}} \cdot \gamma_n + \beta_n
    + \mathrm{residual}_n\right)$$

    Mean and variance are those of the whole batch, in eval the running ones, as in `BatchNorm1d`. With `num_classes`
    the layer learns a γ and a β for each class (`class_weight` and `class_bias`), 1 and 0 to begin with, and the
    condition is a class for each sample. Without it the condition is a pair (γ, β) of tensors (N, C) that the caller
    computed: from a question, a style, a noise vector. γ is the factor itself: a network that predicts an offset from 1
    adds the 1.

    The condition is the second argument of the call, else that of the innermost `with batchnorm.condition(...)` around
    it, which reaches into an `nn.Sequential`; a call without one is an error.

    It is for generators of one network for many classes or styles, and for networks that another modality steers. In
    a class-conditional classifier it would be given the answer. Where classes differ in their statistics, too, the
    statistics of a mixed batch are those of its mixture: in use, batches of one class then come out
    otherwise than in training; `DomainBatchNorm` keeps statistics apart.

    x̂ is computed by the same kernels as in `BatchNorm1d`; scale, residual and activation follow in PyTorch's operators,
    in float32 for half types, and are rounded once. That takes two or three more passes over the elements, and x̂ is
    kept for backward.

    Args:
        num_features: C, the channels of the input.
        num_classes: K, how many classes have a γ and a β; None where the caller gives them.
        eps: ε, added to the variance.
        momentum: weight of the new batch in the running statistics.
        track_running_stats: keep running statistics; without them eval uses the batch's, too.
        device: where parameters and buffers live.
        dtype: of parameters and buffers.
        bias: learn β for each class; without it β is 0. Only with `num_classes`.
        activation: as in `BatchNorm1d`.
        negative_slope: as in `BatchNorm1d`.
        nonfinite: as in `BatchNorm1d`.
        single: as in `BatchNorm1d`.
        backend: as in `BatchNorm1d`.

    Shape:
        input and `residual`: (N, C, *S). `condition`: (N,), integers from 0 to K − 1; or γ and β, both (N, C). `mask`:
        (N, *S), or what broadcasts to it. Output: the input's, and 0 where the mask is. `class_weight`, `class_bias`:
        (K, C).

    State dict:
        The entries of a plain batch norm are loaded into every class, so that a pretrained network can start.

    Raises:
        InputError: no condition, a class out of range (on the CPU; a GPU ends with an assertion of PyTorch's), shapes
            that do not fit, or what `BatchNorm1d` raises.
        InputTypeError: a condition of another kind, integer or complex input.

    Source:
        Dumoulin et al., A Learned Representation for Artistic Style, 2017, arXiv:1610.07629; de Vries et al.,
        Modulating early visual processing by language, 2017, arXiv:1707.00683; in BigGAN: Brock et al., 2019,
        arXiv:1809.11096.

    Example:
        >>> import torch, batchnorm
        >>> layer = batchnorm.ConditionalBatchNorm(3, num_classes=10, activation="relu")
        >>> layer(torch.randn(4, 3, 8, 8), torch.tensor([0, 3, 3, 9])).shape
        torch.Size([4, 3, 8, 8])
        >>> film = batchnorm.ConditionalBatchNorm(3)
        >>> film(torch.randn(4, 3), (torch.rand(4, 3), torch.rand(4, 3))).shape
        torch.Size([4, 3])
    """

    _affine_names: ClassVar[tuple[str, ...]] = ("class_weight", "class_bias")
    _mask_place: ClassVar[int] = 3
    class_weight: Parameter
    class_bias: Parameter | None

    def __init__(
        self,
        num_features: int,
        num_classes: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
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
        if num_classes is not None and (isinstance(num_classes, bool) or not isinstance(num_classes, int)):
            raise InputTypeError(
                message("num_classes", got=type(num_classes).__name__, expected="a whole number, or None")
            )
        if num_classes is not None and num_classes < 1:
            raise InputError(message("num_classes", got=num_classes, expected="at least 1, or None"))
        # `affine` is that of γ and β of shape (C,), which this layer does not have.
        super().__init__(
            num_features,
            eps,
            momentum,
            False,
            track_running_stats,
            device,
            dtype,
            activation=activation,
            negative_slope=negative_slope,
            nonfinite=nonfinite,
            single=single,
            backend=backend,
        )
        self.num_classes = num_classes
        for name in self._affine_names:
            wanted = num_classes is not None and (bias or name != "class_bias")
            empty = torch.empty(num_classes or 0, num_features, device=device, dtype=dtype)
            self.register_parameter(name, Parameter(empty) if wanted else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """γ = 1 and β = 0 for every class, no statistics."""
        super().reset_parameters()
        # PyTorch's constructor calls it first, without them.
        weight, bias = (self._parameters.get(name) for name in self._affine_names)
        if weight is not None:
            init.ones_(weight)
        if bias is not None:
            init.zeros_(bias)

    def forward(  # type: ignore[override]  # the condition stands where it is needed in every call: second
        self,
        input: Tensor,
        condition: Condition | None = None,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """y = act(x̂·γ + β + residual) with γ and β by the condition; see the class."""
        # All is checked before the running statistics move.
        weight, bias = self._affine_of(input, _TOLD.by(self) if condition is None else condition)
        if residual is not None:
            check_residual(input, residual)
        training, tracked = self.training, self.track_running_stats
        running_mean = self.running_mean if tracked or not training else None
        running_var = self.running_var if tracked or not training else None
        xhat = layer_batch_norm(
            input,
            running_mean,
            running_var,
            self.num_batches_tracked if training and tracked else None,
            None,
            None,
            training or (running_mean is None and running_var is None),
            self.momentum,
            self.eps,
            None,
            self.negative_slope,
            None,
            mask,
            self.nonfinite == "skip",
            self.backend,
            single=self.single,
        )
        return self._finished(xhat, weight, bias, residual, mask)

    def _finished(
        self, xhat: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """act(x̂·γ + β + residual), 0 under the mask; rounded to the input's dtype at the end alone."""
        dtype = xhat.dtype
        wide = torch.promote_types(torch.float32 if dtype in _HALF else dtype, weight.dtype)
        spread = (*weight.shape, *[1] * (xhat.dim() - 2))
        weight = weight.to(wide).reshape(spread)
        output = xhat.to(wide) * weight
        if bias is not None:
            output = _plus(output, bias.to(wide).reshape(spread))
        if residual is not None:
            output = _plus(output, residual)
        if mask is not None:
            # Before the activation: each maps 0 to 0, and so neither a NaN under the mask nor its gradient passes.
            valid = mask.expand(xhat.shape[0], *xhat.shape[2:]).unsqueeze(1) != 0
            output = torch.where(valid, output, torch.zeros((), dtype=output.dtype, device=output.device))
        activation = activation_named(self.activation)
        if activation is not None:
            output = activation.forward(output, self.negative_slope)
        return output.to(dtype)

    def _affine_of(self, input: Tensor, condition: object) -> tuple[Tensor, Tensor | None]:
        """γ and β of each sample, (N, C)."""
        if self.num_classes is None:
            return _pair(input, condition, self.num_features)
        indices = _classes(input, condition, self.num_classes)
        bias = self.class_bias
        return F.embedding(indices, self.class_weight), None if bias is None else F.embedding(indices, bias)

    def extra_repr(self) -> str:
        """PyTorch's text and every extra, with the classes in place of `affine`."""
        text = super().extra_repr()
        plain = f"affine={self.affine}, bias={self.bias is not None}"
        bias = "" if self.num_classes is None else f", bias={self.class_bias is not None}"
        return text.replace(plain, f"num_classes={self.num_classes}{bias}").replace(
            f"affine={self.affine}", f"num_classes={self.num_classes}{bias}"
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any, **keywords: Any
    ) -> None:
        for plain, name in zip(("weight", "bias"), self._affine_names, strict=True):
            if self._parameters.get(name) is not None and prefix + plain in state_dict:
                value = state_dict.pop(prefix + plain)
                every = value.expand(self.num_classes, *value.shape).clone()
                state_dict.setdefault(prefix + name, every)
        super()._load_from_state_dict(state_dict, prefix, *arguments, **keywords)


def _plus(output: Tensor, other: Tensor) -> Tensor:
    """The sum, in the memory of `output`, which nothing else holds, where nobody looks on.

    Forward and backward of 32×64×32×32 in float32: 2.4 ms (channels-last 2.6) instead of 2.9 (3.0) with a new tensor,
    and 3.4 (2.9) with torch.addcmul.
    """
    if ops.is_traced(output) or torch.promote_types(output.dtype, other.dtype) != output.dtype:
        return output + other
    return output.add_(other)


def _classes(input: Tensor, condition: object, num_classes: int) -> Tensor:
    """The condition as class indices (N,), checked."""
    wanted = f"a tensor of {input.shape[0]} integers from 0 to {num_classes - 1}, a class for each sample"
    if condition is None:
        raise InputError(message("condition", got="none", expected=wanted, fix=_HOW))
    if not isinstance(condition, Tensor) or condition.dtype not in _INDICES:
        got = condition.dtype if isinstance(condition, Tensor) else type(condition).__name__
        raise InputTypeError(message("condition", got=got, expected=wanted))
    if condition.shape != input.shape[:1]:
        raise InputError(message("condition", got=f"shape {tuple(condition.shape)}", expected=wanted))
    if condition.device != input.device:
        raise InputError(message("condition", got=f"device {condition.device}", expected=str(input.device)))
    if condition.device.type == "cpu" and condition.numel() and not ops.is_traced(condition):
        low, high = (int(each) for each in condition.aminmax())
        if low < 0 or high >= num_classes:
            raise InputError(message("condition", got=f"class {low if low < 0 else high}", expected=wanted))
    return condition


def _pair(input: Tensor, condition: object, channels: int) -> tuple[Tensor, Tensor]:
    """The condition as γ and β of each sample, checked."""
    shape = (input.shape[0], channels)
    wanted = f"a pair of tensors (weight, bias), both of shape {shape}, as the layer has no num_classes"
    if condition is None:
        raise InputError(message("condition", got="none", expected=wanted, fix=_HOW))
    if not isinstance(condition, tuple | list) or len(condition) != 2:
        raise InputTypeError(message("condition", got=type(condition).__name__, expected=wanted))
    weight, bias = condition
    for name, each in (("weight", weight), ("bias", bias)):
        if not isinstance(each, Tensor) or not each.is_floating_point():
            got = each.dtype if isinstance(each, Tensor) else type(each).__name__
            raise InputTypeError(message(f"condition: {name}", got=got, expected=wanted))
        if tuple(each.shape) != shape:
            raise InputError(message(f"condition: {name}", got=f"shape {tuple(each.shape)}", expected=wanted))
        if each.device != input.device:
            raise InputError(
                message(f"condition: {name}", got=f"device {each.device}", expected=str(input.device))
            )
    return weight, bias


_HOW = "Give it as the second argument, or write `with batchnorm.condition(...):` around the call, in its thread."


def condition(value: Condition, model: Module | None = None) -> Scope:
    """A `with` block in which every `ConditionalBatchNorm` is given this condition, also inside an `nn.Sequential`.

    What `batchnorm.domain` says of nesting, threads, checkpoints and `torch.compile` holds here, too; another tensor
    does not compile anew.

    Args:
        value: class indices (N,), or a pair (γ, β) of tensors (N, C): see `ConditionalBatchNorm`. Its shape is checked
            by each layer.
        model: let it hold for the layers of this module alone.

    Raises:
        InputTypeError: neither a tensor nor a pair, or `model` is no module.

    Example:
        >>> import torch, batchnorm
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), batchnorm.ConditionalBatchNorm(3, 10))
        >>> with batchnorm.condition(torch.tensor([1, 5, 5, 0])):
        ...     y = net(torch.randn(4, 2))
    """
    if not isinstance(value, Tensor | tuple | list):
        raise InputTypeError(
            message("condition", got=type(value).__name__, expected="a tensor, or a pair of tensors")
        )
    return _TOLD.within(value, model, ConditionalBatchNorm)


def conditional_of(layer: Module, options: Mapping[str, Any]) -> Module | str:
    """What `convert` puts in a batch norm's place: every class has its numbers. Or why it cannot."""
    if type(layer) not in (BatchNorm1d, BatchNorm2d, BatchNorm3d, AnyBatchNorm):
        return f"{type(layer).__name__} does more than plain batch norm, which ConditionalBatchNorm would not"
    assert isinstance(layer, BatchNorm1d | BatchNorm2d | BatchNorm3d | AnyBatchNorm)
    if options.get("num_classes") is None:
        raise InputError(message("convert: num_classes", got="none", expected="how many classes there are"))
    old = [layer._parameters.get("weight"), layer._parameters.get("bias")]
    first = next((each for each in (*old, layer.running_mean) if each is not None), None)
    made = ConditionalBatchNorm(
        layer.num_features,
        eps=layer.eps,
        momentum=layer.momentum,
        track_running_stats=layer.track_running_stats,
        bias=old[0] is None or old[1] is not None,
        device=None if first is None else first.device,
        dtype=None if first is None else first.dtype,
        **{name: getattr(layer, name) for name in _EXTRAS},
        **options,
    )
    with torch.no_grad():
        for name, value in zip(made._affine_names, old, strict=True):
            own = made._parameters[name]
            if own is not None and value is not None:
                own.copy_(value.expand_as(own)).requires_grad_(value.requires_grad)
    _take_buffers(made, layer)
    return made


def one_class(layer: Module, index: object) -> Module | str:
    """A plain batch norm with the numbers of one class, or why there is none."""
    assert isinstance(layer, ConditionalBatchNorm)
    classes = layer.num_classes
    if classes is None:
        return "its weight and bias are given with each call"
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < classes:
        return f"it has no class {index!r}, but 0 to {classes - 1}"
    made = AnyBatchNorm(
        layer.num_features,
        layer.eps,
        layer.momentum,
        track_running_stats=layer.track_running_stats,
        bias=layer.class_bias is not None,
        device=layer.class_weight.device,
        dtype=layer.class_weight.dtype,
        **{name: getattr(layer, name) for name in _EXTRAS},
    )
    with torch.no_grad():
        for new, name in (("weight", "class_weight"), ("bias", "class_bias")):
            own, value = made._parameters[new], layer._parameters[name]
            if own is not None and value is not None:
                own.copy_(value[index]).requires_grad_(value.requires_grad)
    _take_buffers(made, layer)
    return made


def _take_buffers(made: Module, layer: Module) -> None:
    for name, buffer in layer._buffers.items():
        made._buffers[name] = None if buffer is None else buffer.clone()
    made.training = layer.training


register(
    Family(
        "conditional",
        dict.fromkeys((1, 2, 3), ConditionalBatchNorm),
        rebuilt=Rebuilt(
            conditional_of, one_class, ("num_classes",), "condition", "a weight and a bias for each class"
        ),
    )
)
