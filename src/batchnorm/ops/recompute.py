"""Outputs that backward does not keep: whoever saved one is given a recipe, which computes it again when it is needed.

A layer that recomputes hangs a `Recipe` on the autograd node of its output. What saved that output (a convolution, a
pooling, a product) is found by walking back from what a later layer is given, or from the model's output: the saved
tensor gets a pair of hooks, and lets the output go. Nothing but saved tensors that are such outputs is touched, so
PyTorch's own rules hold for everything else: versions, retain_graph, hooks of others, which come first.

Backward then runs one `normalize` for each operator that had saved the output, by the statistics of forward. Kept for
a second one, it would live through the backward of most of a block; in ResNet-50 4 outputs of 49 are saved by two. With
the kernels of this package that gives the same bits in float32 and the half types; in float64, and with PyTorch's
kernels, the same up to rounding (1e-16, and 1e-7 of the largest value in float32).
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from batchnorm._activations import activation_named
from batchnorm._errors import InputError, message
from batchnorm.ops import aten, eager
from batchnorm.ops.backends import kernels_of

__all__ = ["CAN_SEE", "CHAIN", "can_recompute", "look_behind", "look_behind_output", "remember"]

# In a residual network the output of a block is the residual of the next one, so the recipe of the second needs that of
# the first. At most so many layers in a row. ResNet-50, activations against the network as it is, and elements that
# backward computes again for an image: 1: -29.6 %, 7.0 million; 2: -36.2 %, 11.7; 3: -37.6 %, 14.2; 6 (whole stages):
# -43.3 %, 26.7. The work grows with the square of the length, and a stage of ResNet-152 has 36 blocks.
CHAIN = 2

# Whether this PyTorch shows who has hooks on a saved tensor: without that nothing is replaced.
CAN_SEE = hasattr(torch._C._autograd.SavedTensor, "unpack_hook")

_KEY = "batchnorm"  # in an autograd node's metadata: its Recipe, or None for a node that has been looked at
_VIEWS = 4  # operators between an output and what was saved: a linear layer saves the view that flatten made
_NAMES: dict[type, tuple[str, ...]] = {}

# Input, weight, bias, residual and mask of a call.
_Arguments = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _check_version(now: int, then: int, what: str) -> None:
    if now != then:
        raise InputError(
            message(
                # PyTorch's own words first: code and tests match them.
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                + what,
                got=f"version {now}",
                expected=f"version {then}",
                fix="Change a copy of it, or let the batch norm keep its output (memory='keep').",
            )
        )


class _Watched:
    """The version of a tensor, without its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.version = tensor._version
        # The alias shares the counter of in-place changes, and goes on doing so when it lets its memory go.
        self.alias = tensor.detach()
        self.alias.data = tensor.new_empty(0)

    def changed(self) -> bool:
        return self.alias._version != self.version

    def check(self, what: str) -> None:
        _check_version(self.alias._version, self.version, what)


class _Held:
    """A tensor that a recipe needs, as it was in forward."""

    def __init__(self, tensor: Tensor, what: str) -> None:
        self.tensor, self.version, self.what = tensor.detach(), tensor._version, what

    def __call__(self) -> Tensor:
        _check_version(self.tensor._version, self.version, self.what)
        return self.tensor


class Recipe:
    """How one output is computed again. It holds no big tensor: the node of the layer keeps the input anyway.

    Weight and bias are copies: small, and right whatever becomes of the parameters (a sharded parameter has no memory
    between forward and backward).
    """

    def __init__(
        self,
        output: Tensor,
        arguments: _Arguments,
        statistics: Callable[[], tuple[Tensor, Tensor]],
        rule: tuple[str | None, float],
        normalize: Callable[..., Tensor],
    ) -> None:
        input, weight, bias, residual, mask = arguments
        self.output = _Watched(output)
        # A reference that keeps no memory; while it lives no other storage gets this one's number.
        self.storage = StorageWeakRef(output.untyped_storage())
        self.shape, self.stride, self.dtype = output.shape, output.stride(), output.dtype
        self.input = weakref.ref(input), input._version
        self.statistics, self.rule, self.normalize, self.mask = statistics, rule, normalize, mask
        self.weight = None if weight is None else weight.detach().clone()
        self.bias = None if bias is None else bias.detach().clone()
        self.residual = None if residual is None else (weakref.ref(residual), residual._version)
        before = None if residual is None else _recipe(residual.grad_fn)
        self.before = None if before is None or before.output.changed() else before
        self.depth: int = 1 if self.before is None else self.before.depth + 1

    def take(self) -> "_Again | None":
        """With all that it needs, to be kept; None where something is gone or has changed: the output stays then."""
        input = _as_before(self.input, "the input of a batch norm")
        if input is None:
            return None
        residual: _Again | _Held | None = None
        if self.residual is not None:
            residual = (
                _as_before(self.residual, "the residual of a batch norm")
                if self.before is None
                else self.before.take()
            )
            if residual is None:
                return None
        return _Again(self, input, residual)


def _as_before(kept: tuple[weakref.ref[Tensor], int], what: str) -> _Held | None:
    reference, version = kept
    tensor = reference()
    return None if tensor is None or tensor._version != version else _Held(tensor, what)


class _Again:
    """A recipe with its ingredients."""

    def __init__(self, recipe: Recipe, input: _Held, residual: "_Again | _Held | None") -> None:
        self.recipe, self.input, self.residual = recipe, input, residual

    def __call__(self) -> Tensor:
        recipe, x = self.recipe, self.input()
        residual = None if self.residual is None else self.residual()
        y = recipe.normalize(
            x, *recipe.statistics(), recipe.weight, recipe.bias, residual, recipe.mask, *recipe.rule
        )
        if y.stride() == recipe.stride:
            return y
        return torch.empty_strided(recipe.shape, recipe.stride, dtype=y.dtype, device=y.device).copy_(y)


class _Packed:
    """What an operator holds instead of an output, a view of it, or a copy in another dtype (autocast's)."""

    def __init__(self, again: _Again, saved: Tensor, copied: bool) -> None:
        self.again, self.saved = again, _Watched(saved)
        self.dtype = saved.dtype if copied else None
        self.geometry = (saved.shape, saved.stride(), saved.storage_offset())

    @torch.no_grad()
    def unpack(self) -> Tensor:
        self.saved.check("the output of a batch norm that recomputes it")
        y = self.again()
        return y.as_strided(*self.geometry) if self.dtype is None else y.to(self.dtype)


def _unpack(packed: _Packed) -> Tensor:
    return packed.unpack()


def can_recompute() -> bool:
    """Whether a call's output may be left to a recipe: where others pack what is saved, that is theirs to decide."""
    return (
        CAN_SEE
        and torch.is_grad_enabled()
        and not torch.is_inference_mode_enabled()
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    )


def _recipe(node: Any) -> Recipe | None:
    return None if node is None else node.metadata.get(_KEY)


def look_behind_output(module: torch.nn.Module, args: Any, output: Any) -> None:
    """A forward hook of the model: what its last operators saved. No later layer of ours sees those."""
    if not torch.compiler.is_compiling():
        look_behind(*(each for each in tree_leaves(output) if isinstance(each, Tensor)))


def look_behind(*tensors: Tensor | None) -> None:
    """Let the operators that these tensors come from hold recipes, back to the layers that have looked already."""
    if not CAN_SEE:
        return
    nodes = [tensor.grad_fn for tensor in tensors if tensor is not None and tensor.grad_fn is not None]
    while nodes:
        node: Any = nodes.pop()
        behind = node.next_functions
        if not behind or _KEY in node.metadata:
            continue
        node.metadata[_KEY] = None
        for saved in _saved(node):
            _replace(saved)
        nodes += [each for each, _ in behind if each is not None]


def _saved(node: Any) -> Iterator[Any]:
    """The saved tensors of a node that nobody's hooks are on."""
    names = _NAMES.get(type(node))
    if names is None:
        found = tuple(name for name in dir(type(node)) if name.startswith("_raw_saved_"))
        names = _NAMES.setdefault(type(node), found)
    for name in names:
        value = getattr(node, name)
        for each in value if isinstance(value, tuple | list) else (value,):
            if each is not None and each.unpack_hook is None and each.data is not None:
                yield each


def _replace(saved: Any) -> None:
    """Put the recipe in the place of a saved tensor, if it is the output of a layer that recomputes."""
    tensor = saved.data
    node: Any = tensor.grad_fn
    way: list[str] = []
    while node is not None and _recipe(node) is None and len(way) < _VIEWS:
        way.append(node.name())
        node = node.next_functions[0][0] if len(node.next_functions) == 1 else None
    recipe = _recipe(node)
    if recipe is None or recipe.output.changed():
        return
    if tensor.untyped_storage()._cdata == recipe.storage.cdata:
        # A view in other numbers (complex, negated) is none of its elements.
        if tensor.dtype == recipe.dtype and not tensor.is_neg():
            _pack(saved, tensor, recipe, copied=False)
    elif (
        way == ["ToCopyBackward0"]
        and tensor._version == 0
        and tensor.device == recipe.output.alias.device
        and (tensor.shape, tensor.stride()) == (recipe.shape, recipe.stride)
    ):
        _pack(saved, tensor, recipe, copied=True)


def _pack(saved: Any, tensor: Tensor, recipe: Recipe, *, copied: bool) -> None:
    again = recipe.take()
    if again is not None:
        packed = _Packed(again, tensor, copied)
        saved.register_hooks(lambda _: packed, _unpack)


def remember(
    output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running: tuple[Tensor, Tensor] | None,
    eps: float,
    activation: str | None,
    slope: float,
    backend: str,
) -> None:
    """Hang the recipe on the node of a layer's output; `running` are the statistics it was computed by in eval mode."""
    node: Any = output.grad_fn
    if node is None:
        return
    made = (input, weight, bias, residual, mask)
    if backend == "aten":
        if mask is None:
            _remember_aten(output, made, running, eps, activation, slope)
        return
    kernels = kernels_of(backend)

    def normalize(x: Tensor, *arguments: Any) -> Tensor:
        return eager.like(kernels.normalize(x, *arguments)[0], x)

    mean, spread = eager.statistics_of(node)
    given = running is not None

    def statistics() -> tuple[Tensor, Tensor]:
        return mean, spread if given else (spread + eps).sqrt().reciprocal()

    node.metadata[_KEY] = None
    _hang(node, Recipe(output, made, statistics, (activation, slope), normalize))
    # The residual, where it is what backward must keep; the input is what the recipe itself is made of.
    for saved in _saved(node):
        if saved.data is not input:
            _replace(saved)


def _hang(node: Any, recipe: Recipe) -> None:
    if recipe.depth <= CHAIN:
        node.metadata[_KEY] = recipe


def _remember_aten(
    output: Tensor,
    made: _Arguments,
    running: tuple[Tensor, Tensor] | None,
    eps: float,
    activation: str | None,
    slope: float,
) -> None:
    """PyTorch's batch norm, addition and activation are a node each; the activation has saved its input or output."""
    last: Any = output.grad_fn
    act = activation_named(activation)
    node = last if act is None else last.next_functions[0][0]
    norm = node if made[3] is None else node.next_functions[0][0]
    if norm is None or not hasattr(norm, "_saved_result1"):
        return
    given = running is not None
    mean, spread = (
        (each.clone() for each in running) if running else (norm._saved_result1, norm._saved_result2)
    )
    if not given and mean.dtype in (torch.bfloat16, torch.float16):
        return  # rounded to 8 or 11 bits, as PyTorch's CPU kernel saves them: ReLU's gradient would miss by 5 %
    wide = torch.float32 if mean.device.type == "mps" else torch.float64

    def statistics() -> tuple[Tensor, Tensor]:
        return mean, spread if given else spread.to(wide).square().reciprocal().to(spread.dtype)

    normalize = functools.partial(aten.normalize, eps=eps if given else 0.0)
    for each in (norm, node, last):
        each.metadata[_KEY] = None
    recipe = Recipe(output, made, statistics, (activation, slope), normalize)
    _hang(last, recipe)
    if act is None or _recipe(last) is None:
        return
    for saved in _saved(last):
        tensor = saved.data
        if tensor.grad_fn is None and tensor.data_ptr() == output.data_ptr():
            _pack(saved, tensor, recipe, copied=False)
        elif tensor.grad_fn is node:
            before = Recipe(tensor, made, statistics, (None, slope), normalize)
            _pack(saved, tensor, before, copied=False)
