"""DomainBatchNorm: statistics for each domain that batches come from."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from batchnorm._errors import InputError, InputTypeError, ModelError, message
from batchnorm._validation import Single
from batchnorm.nn._scopes import Scope, Told
from batchnorm.nn._unscriptable import Unscriptable
from batchnorm.nn.batch_norm import Extras, NonFinite
from batchnorm.nn.families import Family, Rebuilt, register
from batchnorm.nn.member import AnyBatchNorm

__all__ = ["DomainBatchNorm", "domain", "domains_of", "one_domain"]

_TOLD = Told("domain")
_AFFINE = ("weight", "bias")
_OF_A_LAYER = (*_AFFINE, "running_mean", "running_var", "num_batches_tracked")


class DomainBatchNorm(Unscriptable, Module):
    r"""Batch normalization with statistics for each domain: clean and adversarial, source and target, real and fake.

    $$y = \mathrm{act}\left(\frac{x - \mathrm{E}_d[x]}{\sqrt{\mathrm{Var}_d[x] + \varepsilon}} \cdot \gamma + \beta +
    \mathrm{residual}\right)$$

    Every call is of one domain d. It is normalized by its own batch in training and by the running statistics of its
    domain in eval, and moves those alone. γ and β are one for all domains, or with `shared_affine=False` each domain
    has its own. A network whose batches come from sources with different statistics otherwise learns running
    statistics that are of neither: the network in use is then another one than in training.

    The domain is the argument `domain` of the call, else that of the innermost `with batchnorm.domain(...)` around it,
    else `default`; without any of these a call is an error. It never depends on the order of the calls. A batch that
    mixes domains has to be split, one call for each.

    The layer holds an ordinary batch norm for each domain, under its name: `layer.clean.running_mean`. So everything
    that works on batch norms finds them. `recalibrate` inside a `with` block sets the statistics of that domain alone;
    `freeze`, `averaged`, `adapt` and `parameter_groups` treat each as a layer. (PyTorch's `update_bn` first resets the
    statistics of all domains, also of those that its data do not reach.) `batchnorm.convert(model, "domain")` makes
    domain layers of a network's batch norms, and `convert(model, "batchnorm", domain="clean")` plain ones that keep
    the numbers of one domain: then `fold` can work on them.

    Wrong to use where the domain of a sample is not known when the network is used, unless one domain (`default`) is
    what it is used for. Each domain learns its statistics from its own share of the batches.

    Args:
        num_features: C, the channels of the input.
        domains: their names.
        eps: ε, added to the variance.
        momentum: weight of the new batch in the running statistics of its domain.
        affine: learn γ and β.
        track_running_stats: keep running statistics, for each domain.
        device: where parameters and buffers live.
        dtype: of parameters and buffers.
        shared_affine: one γ and one β for all domains, the very same parameters. With its own for each (as in both
            papers), the parameters of a domain that a step does not call get no gradient in it: DistributedDataParallel
            then wants `find_unused_parameters=True`.
        default: the domain of calls that nothing else gives one, for example "clean" when the network is used.
        bias: learn β; without it β is 0.
        activation: as in `BatchNorm1d`.
        negative_slope: as in `BatchNorm1d`.
        nonfinite: as in `BatchNorm1d`.
        single: as in `BatchNorm1d`.
        backend: as in `BatchNorm1d`.

    Shape:
        input and `residual`: (N, C, *S). `mask`: (N, *S), or what broadcasts to it. Output: the input's.

    State dict:
        The entries of every domain under its name; shared parameters appear in each. The entries of a plain batch norm
        are loaded into every domain, so that a pretrained network can start.

    Raises:
        InputError: no domain for a call, one that the layer does not have, or what `BatchNorm1d` raises.
        InputTypeError: `domains` are not names, integer or complex input.
        ModelError: a residual or a mask where `torch.nn.SyncBatchNorm` has taken the place of the inner layers.

    Source:
        Xie et al., Adversarial Examples Improve Image Recognition, 2020, arXiv:1911.09665 (auxiliary batch norms);
        Chang et al., Domain-Specific Batch Normalization for Unsupervised Domain Adaptation, 2019, arXiv:1906.03950.

    Example:
        >>> import torch, batchnorm
        >>> layer = batchnorm.DomainBatchNorm(3, domains=("source", "target"))
        >>> with batchnorm.domain("target"):
        ...     y = layer(torch.randn(8, 3) + 5)
        >>> layer.source.running_mean.abs().max().item(), layer.target.running_mean.min().item() > 0.3
        (0.0, True)
        >>> layer.source.weight is layer.target.weight
        True
    """

    def __init__(
        self,
        num_features: int,
        domains: Iterable[str] = ("clean", "adversarial"),
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        shared_affine: bool = True,
        default: str | None = None,
        activation: str | None = None,
        negative_slope: float = 0.01,
        nonfinite: NonFinite = "propagate",
        single: Single = "error",
        backend: str | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        layer = AnyBatchNorm(
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
        self._hold(layer, domains, shared_affine, default)

    def _hold(self, layer: Module, domains: Iterable[str], shared_affine: bool, default: str | None) -> None:
        """A copy of the layer for each domain; the first has its very parameters, with `shared_affine` all have."""
        self.num_features = layer.num_features
        self.shared_affine = shared_affine
        self.default = default
        # torch.fx takes a module for a leaf by this attribute: traced into, it would keep the domain of the trace.
        self.__dict__["__module__"] = torch.nn.BatchNorm1d.__module__
        names = _checked(domains, default, self)
        for number, name in enumerate(names):
            same = number == 0 or shared_affine
            kept: dict[int, Any] = {id(each): each for each in layer.parameters()} if same else {}
            self.add_module(name, copy.deepcopy(layer, kept))
        self.training = layer.training

    @classmethod
    def of(
        cls,
        layer: Module,
        domains: Iterable[str] = ("clean", "adversarial"),
        *,
        shared_affine: bool = True,
        default: str | None = None,
    ) -> Self:
        """Domains that all begin with the numbers of a batch norm, whose class and options they have."""
        made = cls.__new__(cls)
        Module.__init__(made)
        made._hold(layer, domains, shared_affine, default)
        return made

    @property
    def domains(self) -> tuple[str, ...]:
        """The names of the domains."""
        return tuple(self._modules)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        domain: str | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """y = act(batch norm of the domain(input) + residual); see the class, and `BatchNorm1d` for `inplace`."""
        if isinstance(residual, str):
            raise InputTypeError(
                message(
                    "DomainBatchNorm: residual",
                    got=f"the text {residual!r}",
                    expected="a torch.Tensor",
                    fix=f"Name the domain: layer(input, domain={residual!r}).",
                )
            )
        if domain is None:
            domain = _TOLD.by(self)
        layer = self._layer(self.default if domain is None else domain)
        if residual is None and mask is None and not inplace:
            output: Tensor = layer(input)
        elif isinstance(layer, Extras):
            output = layer(input, residual, mask, inplace=inplace)
        else:
            raise ModelError(
                message(
                    "DomainBatchNorm",
                    got=f"a residual, a mask or inplace for a {type(layer).__name__}",
                    expected="layers of this package inside of it",
                    fix="batchnorm.convert(model, 'batchnorm') gives it some.",
                )
            )
        return output

    def _layer(self, domain: str | None) -> Module:
        layer = self._modules.get(domain) if isinstance(domain, str) else None
        if layer is None:
            known = ", ".join(map(repr, self._modules))
            raise InputError(
                message(
                    "domain",
                    got="none" if domain is None else repr(domain),
                    expected=f"one of {known}",
                    fix=f"Write `with batchnorm.domain({next(iter(self._modules))!r}):` around the call, in its thread."
                    if domain is None
                    else "",
                )
            )
        return layer

    def reset_running_stats(self) -> None:
        """Forget the running statistics of all domains."""
        for layer in self.children():
            layer.reset_running_stats()  # type: ignore[operator]

    def reset_parameters(self) -> None:
        """Make all domains new: γ = 1, β = 0, no statistics."""
        for layer in self.children():
            layer.reset_parameters()  # type: ignore[operator]

    def extra_repr(self) -> str:
        """The options that the layers inside do not show."""
        default = "" if self.default is None else f", default={self.default!r}"
        return f"{self.num_features}, domains={self.domains}, shared_affine={self.shared_affine}{default}"

    def _shared(self) -> list[str]:
        """The parameters that are one for all domains."""
        layers = list(self.children())
        held = {name: [layer._parameters.get(name) for layer in layers] for name in _AFFINE}
        return [
            name
            for name, (first, *others) in held.items()
            if first is not None and all(each is first for each in others)
        ]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # Where PyTorch makes new parameters (to_empty, for one) it makes one for each name.
        shared = self._shared()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        first, *others = self.children()
        for name in shared:
            for layer in others:
                layer._parameters[name] = first._parameters[name]
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in _OF_A_LAYER:
            if prefix + name in state_dict:  # those of a plain batch norm: a copy for each
                value = state_dict.pop(prefix + name)
                for domain in self.domains:
                    state_dict.setdefault(f"{prefix}{domain}.{name}", value.clone())
        for name in self._shared():
            self._load_shared(name, state_dict, prefix, local_metadata, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _load_shared(
        self,
        name: str,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        error_msgs: list[str],
    ) -> None:
        """One value for all domains, also where a file has it once; an error where the domains' differ."""
        keys = [f"{prefix}{domain}.{name}" for domain in self.domains]
        values = [state_dict[key] for key in keys if key in state_dict]
        if not values:
            return
        if any(_differ(values[0], each) for each in values[1:]):
            error_msgs.append(
                message(
                    f"{prefix}{self.domains[0]}.{name} and those of the other domains",
                    got="values that differ",
                    expected="one for all domains",
                    fix="Make the layer with shared_affine=False.",
                )
            )
            return
        value = values[0]
        if local_metadata.get("assign_to_params_buffers") and not isinstance(value, Parameter):
            own = self._layer(self.domains[0])._parameters[name]
            value = Parameter(value, requires_grad=own is not None and own.requires_grad)
        state_dict.update(dict.fromkeys(keys, value))


def _differ(a: Tensor, b: Tensor) -> bool:
    if a is b or a.is_meta or b.is_meta:
        return False
    return a.shape != b.shape or not torch.equal(a, b.to(a.device))


def _checked(domains: Iterable[str], default: str | None, layer: Module) -> tuple[str, ...]:
    """The names, none of which hides anything else of the layer."""
    names = () if isinstance(domains, str) or not isinstance(domains, Iterable) else tuple(domains)
    if not names or not all(isinstance(name, str) for name in names):
        raise InputTypeError(
            message("domains", got=repr(domains), expected="names, such as ('clean', 'adversarial')")
        )
    for name in names:
        taken = hasattr(layer, name) or name in _OF_A_LAYER
        if taken or not name or "." in name or names.count(name) > 1:
            raise InputError(
                message(
                    "domains",
                    got=repr(name) + (" twice" if names.count(name) > 1 else ""),
                    expected="names that differ, without a dot, and that no attribute of a module has",
                )
            )
    if default is not None and default not in names:
        raise InputError(
            message("default", got=repr(default), expected=f"None or one of {', '.join(map(repr, names))}")
        )
    return names


def domain(name: str, model: Module | None = None) -> Scope:
    """A `with` block in which every `DomainBatchNorm` works for this domain.

    Blocks may be nested; the innermost that reaches a layer holds, and an argument `domain=` of a call goes before all.
    A block ends with everything before it in place, after an exception, too. Under `torch.compile` the domain is a
    constant: a network is compiled once for each.

    It holds for the thread that opened it, as `torch.no_grad` does. In other threads give the domain with the call, or
    open the block there, in the model's own forward: so in the replicas of `torch.nn.DataParallel`, and in what
    `torch.utils.checkpoint` runs again in backward, which has long left the block. There `default` would be taken
    instead, without an error. Workers of a DataLoader run no network; that their batches are of one domain is
    the caller's to see to.

    Args:
        name: of the domain. A layer that does not have it raises an error when it is called.
        model: let it hold for the layers of this module alone, say of the discriminator.

    Raises:
        InputTypeError: `name` is no string, or `model` no module.

    Example:
        >>> import torch, batchnorm
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), batchnorm.DomainBatchNorm(3))
        >>> with batchnorm.domain("clean"):
        ...     y = net(torch.randn(4, 2))
        >>> net[1].clean.num_batches_tracked.item(), net[1].adversarial.num_batches_tracked.item()
        (1, 0)
    """
    if not isinstance(name, str):
        raise InputTypeError(message("domain", got=type(name).__name__, expected="the name of a domain"))
    return _TOLD.within(name, model, DomainBatchNorm)


def domains_of(layer: Module, options: Mapping[str, Any]) -> Module:
    """What `convert` puts in a batch norm's place."""
    return DomainBatchNorm.of(layer, **options)


def one_domain(layer: Module, name: object) -> Module | str:
    """A copy of the batch norm of one domain with its very parameters, or why there is none."""
    kept = layer._modules.get(name) if isinstance(name, str) else None
    if kept is None:
        return f"it has no domain {name!r}, but {', '.join(map(repr, layer._modules))}"
    return copy.deepcopy(kept, {id(each): each for each in kept.parameters()})


register(
    Family(
        "domain",
        dict.fromkeys((1, 2, 3), DomainBatchNorm),
        rebuilt=Rebuilt(
            domains_of,
            one_domain,
            ("domains", "shared_affine", "default"),
            "domain",
            "statistics for each domain",
        ),
    )
)
