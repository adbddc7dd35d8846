"""What a layer or a function is, as far as placing batch norm is concerned."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import activation, pooling
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd

from batchnorm.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, DomainBatchNorm

__all__ = [
    "ACTIVATION_FUNCTIONS",
    "ACTIVATION_METHODS",
    "ADDITION_FUNCTIONS",
    "ADDITION_METHODS",
    "NORM_FUNCTIONS",
    "PASSING_FUNCTIONS",
    "PASSING_METHODS",
    "SHAPE_METHODS",
    "Producer",
    "batch_norm_class",
    "depth",
    "has_own_forward",
    "is_activation",
    "is_batch_norm",
    "is_drop",
    "is_norm",
    "is_passing",
    "is_producer",
    "width",
    "words",
]

Producer = (
    nn.Conv1d
    | nn.Conv2d
    | nn.Conv3d
    | nn.ConvTranspose1d
    | nn.ConvTranspose2d
    | nn.ConvTranspose3d
    | nn.Linear
)

_ACTIVATIONS = (
    activation.CELU,
    activation.ELU,
    activation.GELU,
    activation.Hardshrink,
    activation.Hardsigmoid,
    activation.Hardswish,
    activation.Hardtanh,
    activation.LeakyReLU,
    activation.LogSigmoid,
    activation.Mish,
    activation.PReLU,
    activation.ReLU,
    activation.RReLU,
    activation.SELU,
    activation.SiLU,
    activation.Sigmoid,
    activation.Softplus,
    activation.Softshrink,
    activation.Softsign,
    activation.Tanh,
    activation.Tanhshrink,
    activation.Threshold,
)
_POOLS = (
    pooling._AdaptiveAvgPoolNd,
    pooling._AdaptiveMaxPoolNd,
    pooling._AvgPoolNd,
    pooling._LPPoolNd,
    pooling._MaxPoolNd,
)
_PASSING = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Upsample, _DropoutNd, *_POOLS)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_NORM_NAMES = ("batchnorm", "groupnorm", "instancenorm", "layernorm", "rmsnorm")
_DROP_NAMES = ("droppath", "stochasticdepth", "dropblock2d")


def words(text: str) -> frozenset[str]:
    """The words of a text, each once."""
    return frozenset(text.split())


def _functions(names: str, *spaces: Any) -> frozenset[Callable[..., Any]]:
    """The functions of these names, in torch.nn.functional and torch where no other space is given."""
    found = (getattr(space, name, None) for name in words(names) for space in spaces or (F, torch))
    return frozenset(function for function in found if function is not None)


ACTIVATION_METHODS = words(
    "relu relu_ sigmoid sigmoid_ tanh tanh_ celu celu_ elu elu_ gelu hardswish hardtanh hardtanh_ leaky_relu "
    "leaky_relu_ mish prelu relu6 selu selu_ silu softplus hardsigmoid"
)
ACTIVATION_FUNCTIONS = _functions(
    "celu celu_ elu elu_ gelu hardshrink hardsigmoid hardswish hardtanh hardtanh_ leaky_relu leaky_relu_ "
    "logsigmoid mish prelu relu relu6 relu_ rrelu rrelu_ selu selu_ sigmoid sigmoid_ silu softplus softshrink "
    "softsign tanh tanh_ tanhshrink threshold threshold_"
) | _functions("expit", torch.special)
ADDITION_METHODS = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})
ADDITION_FUNCTIONS = frozenset({operator.add, operator.iadd, torch.add})
# What leaves every value in its channel, or moves it without mixing it with another: the batch norm may stand
# before it. Pooling, resizing and concatenation belong here, convolutions and products do not.
PASSING_METHODS = words(
    "contiguous clone float half bfloat16 double to type_as flatten unflatten permute movedim reshape squeeze "
    "swapaxes transpose unsqueeze view"
)
PASSING_FUNCTIONS = _functions(
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d alpha_dropout avg_pool1d avg_pool2d avg_pool3d cat clone concat concatenate dropout "
    "dropout1d dropout2d dropout3d feature_alpha_dropout flatten interpolate max_pool1d max_pool2d max_pool3d "
    "movedim permute reshape squeeze swapaxes transpose unflatten unsqueeze"
)
NORM_FUNCTIONS = _functions("batch_norm group_norm instance_norm layer_norm local_response_norm rms_norm")
SHAPE_METHODS = frozenset({"dim", "ndimension", "numel", "size", "stride"})


def _class_name(module: nn.Module) -> str:
    return type(module).__name__.lower().replace("_", "")


def is_batch_norm(module: nn.Module) -> bool:
    """A torch batch norm or a subclass: 1d, 2d, 3d, synchronized, ours."""
    return isinstance(module, _BatchNorm)


def is_norm(module: nn.Module) -> bool:
    """A normalization layer; layers of other packages are known by their names."""
    if isinstance(module, (*_NORMS, DomainBatchNorm)):
        return True
    return not module._modules and any(name in _class_name(module) for name in _NORM_NAMES)


def is_activation(module: nn.Module) -> bool:
    """An elementwise activation layer."""
    return isinstance(module, _ACTIVATIONS)


def is_drop(module: nn.Module) -> bool:
    """A layer of another package that drops whole paths or blocks in training and does nothing in evaluation."""
    return not module._modules and _class_name(module) in _DROP_NAMES


def is_passing(module: nn.Module) -> bool:
    """A layer that batch norm may stand before instead of behind: dropout, reshape, pooling, resizing."""
    return isinstance(module, _PASSING) or is_drop(module)


def is_producer(module: nn.Module) -> bool:
    """A convolution, transposed convolution or linear layer."""
    return isinstance(module, Producer)


def width(module: nn.Module) -> int:
    """How many channels (features) a producer gives."""
    return int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)  # type: ignore[arg-type]


def depth(module: nn.Module) -> int:
    """How many channels (features) a producer takes."""
    return int(module.in_features if isinstance(module, nn.Linear) else module.in_channels)  # type: ignore[arg-type]


def batch_norm_class(module: nn.Module) -> type[BatchNorm1d | BatchNorm2d | BatchNorm3d]:
    """The batch norm that fits a producer's output."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        return BatchNorm2d
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
        return BatchNorm3d
    return BatchNorm1d


def has_own_forward(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether the module's forward is another one than those of `classes` (a subclass's, or patched in)."""
    return "forward" in vars(module) or type(module).forward not in {each.forward for each in classes}
