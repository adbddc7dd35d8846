"""`adapt`: a network on data of another origin, without labels, for the time of a `with` block."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm._errors import DataError, InputError, InputTypeError, ModelError, message
from batchnorm.nn.batch_norm import Extras
from batchnorm.stats._moments import Pool, batch_pool
from batchnorm.stats._passes import seen_by
from batchnorm.stats._precision import block_scatter, precision
from batchnorm.stats._still import Still, plainly
from batchnorm.stats._targets import Target, bare, targets

__all__ = ["Adapted", "adapt"]

Method = Literal["batch", "blend", "tent"]
METHODS = ("batch", "blend", "tent")
# Schneider et al. see the gain from 16 or 32 samples on, with nothing of the source's statistics kept.
_FEW = 16
_UNLIKE, _BLOCKS = 4.0, 8


class Adapted:
    """The network of an `adapt` block: call it as the model.

    `batches` is how many calls it has seen, `design_effect` how many times more the batch means of the first layer's
    input scatter than those of shuffled batches would, squared (1 is as much; nan before there are eight batches).

    Example:
        >>> import torch, batchnorm
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        >>> with batchnorm.adapt(net, "blend", prior=16) as adapted:
        ...     y = adapted(torch.randn(32, 2) + 5)
        >>> adapted
        Adapted(Sequential, 'blend', prior=16: 1 batch, ended)
    """

    def __init__(self, model: nn.Module, found: tuple[Target, ...], method: Method, prior: float) -> None:
        self.model = model
        self.method = method
        self.prior = prior
        self.batches = 0
        self.optimizer: torch.optim.Optimizer | None = None
        self._targets = found
        self._pool: Pool | None = None
        self._first, self._eps = -1, 0.0
        self._few_told = self._sorted_told = self._open = False
        self._few_samples = 0

    def __repr__(self) -> str:
        prior = f", prior={self.prior:g}" if self.method == "blend" else ""
        seen = f"{self.batches} {'batch' if self.batches == 1 else 'batches'}"
        effect = "" if math.isnan(self.design_effect) else f", design effect {self.design_effect:.2g}"
        ended = "" if self._open else ", ended"
        return f"Adapted({type(self.model).__name__}, {self.method!r}{prior}: {seen}{effect}{ended})"

    @property
    def design_effect(self) -> float:
        """That of the first layer's input, which no adaptation has touched."""
        if self._pool is None or len(self._pool.blocks) < _BLOCKS:
            return math.nan
        return precision(self._pool, block_scatter(self._pool), len(self._pool.blocks), self._eps)[1]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output with adapted batch norms; with "tent", γ and β then make a step."""
        if not self._open:
            raise ModelError(
                message(
                    "adapt",
                    got="a call after the block has ended",
                    expected="calls inside of it",
                    fix="The model is as it was: call it.",
                )
            )
        if self.optimizer is None:
            with plainly(grad=False):
                output = self.model(*args, **kwargs)
        else:
            with plainly(grad=True):
                output = self.model(*args, **kwargs)
                loss = _entropy(output)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            output = output.detach()
        self.batches += 1
        self._warn_of_few()
        self._warn_of_stretches()
        return output

    def _warn_of_few(self) -> None:
        if self._few_told or not self._few_samples:
            return
        self._few_told = True
        warnings.warn(
            f"batchnorm.adapt: statistics of {self._few_samples} samples are noise more than adaptation; below {_FEW} "
            "use method='blend'.",
            stacklevel=3,
        )

    def _warn_of_stretches(self) -> None:
        if self._sorted_told or self.batches % _BLOCKS:
            return
        effect = self.design_effect
        if effect > _UNLIKE:
            self._sorted_told = True
            warnings.warn(
                f"batchnorm.adapt: the batch means scatter {effect:.0f} times as much as those of shuffled data. The "
                "stream is sorted, by class perhaps, or its origin changes. In batches of one class the batch's own "
                "statistics take the class away with the mean: shuffle the stream, or use batchnorm.recalibrate on all "
                "of it; method='blend' with a large prior loses less.",
                stacklevel=3,
            )

    def hook(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """What lends a layer its statistics, before it runs."""
        target = self._targets[index]
        source = target.mean.detach().cpu().double(), target.var.detach().cpu().double()

        def lend(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen = seen_by(layer, target.channels, args, kwargs)
            if seen is None or not seen[0].numel():
                return
            self._check_size(seen[0].shape[0])
            if self.method == "tent" and self._first not in (-1, index):
                return  # in training mode it normalizes by the batch itself
            values, samples = batch_pool(seen[0].detach().cpu(), None if seen[1] is None else seen[1].cpu())
            if self._pool is None:
                self._pool, self._first = Pool(target.channels, torch.device("cpu")), index
                self._eps = target.module.eps
            if self._first == index:
                self._pool.add(values, samples)
            if self.method == "tent":
                return
            n = seen[0].shape[0]
            share = n / (self.prior + n)
            mean, var = layer.running_mean, layer.running_var
            if isinstance(mean, Tensor) and isinstance(var, Tensor):
                with torch.no_grad():
                    mean.copy_((1 - share) * source[0] + share * values.mean)
                    var.copy_((1 - share) * source[1] + share * values.biased_var)

        return lend

    def _check_size(self, n: int) -> None:
        if self.method == "blend":
            return
        if n < 2:
            raise DataError(
                message(
                    f"adapt with method={self.method!r}",
                    got="a batch of one sample",
                    expected=f"two at least, and better {_FEW} or more",
                    fix="Use method='blend', which leans on the source's statistics.",
                )
            )
        if n < _FEW and not self._few_samples:
            self._few_samples = n  # told at the end of the call, where the user's line is known


def adapt(
    model: nn.Module,
    method: Method = "blend",
    *,
    prior: float = 16.0,
    lr: float = 1e-3,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
) -> AbstractContextManager[Adapted]:
    r"""Run a network on data of another origin with batch norms that follow the data, and leave it as it was.

    With n samples in the batch, its mean and variance (μ, σ²) and the source's, which are the running ones:

    - "batch": the batch's own statistics, in place of the source's (prediction-time batch norm).
    - "blend": both, the source counting as N = `prior` samples:

      $$\bar\mu = \frac{N}{N + n}\,\mu_s + \frac{n}{N + n}\,\mu, \qquad
      \bar\sigma^2 = \frac{N}{N + n}\,\sigma_s^2 + \frac{n}{N + n}\,\sigma^2$$

    - "tent": the batch's own, and after each batch a step of γ and β that lowers the mean entropy of the predictions
      softmax(output), by Adam. The output is that of before the step, as in the paper.

    All other modules are in eval mode. However the block ends, afterwards modes, buffers, γ, β, their gradients and
    requires_grad are what they were, bit by bit; frozen layers (see `recalibrate`) take no part.

    **Where it harms**: a batch must be a fair sample of the new data. In batches of one class (a sorted stream, a
    video) the mean of the batch is the class, and it is normalized away. What is looked at is how much the batch means
    of the first layer's input scatter; from eight batches on, a squared scatter beyond four times that of shuffled data
    gives a warning. It cannot tell classes from a change of origin, cannot see a stream that never leaves its first
    class, and sees nothing in one batch. For a whole data set at hand, `recalibrate` does not depend on the batch.

    Args:
        model: the network; for "tent" its output must be logits, (N, classes).
        method: "batch", "blend" or "tent".
        prior: N of "blend", in samples: 0 is "batch", large is the source.
        lr: learning rate of "tent".
        optimizer: for "tent", makes another optimizer than Adam from the list of γ and β.

    Returns:
        A context manager for a `with` block, which gives an Adapted, to be called as the model is. Each block begins
        anew.

    Raises:
        InputError: an option out of range.
        InputTypeError: `model` is no module.
        ModelError: no batch norm with running statistics, or for "tent" none with γ or β.
        DataError: from a call in the block: with "batch" and "tent", one sample; with "tent", an output that is no
            (N, classes).

    Source:
        Schneider et al., Improving robustness against common corruptions by covariate shift adaptation, 2020,
        arXiv:2006.16971; Nado et al., Evaluating prediction-time batch normalization, 2020, arXiv:2006.10963; Wang et
        al., Tent: fully test-time adaptation by entropy minimization, 2021, arXiv:2006.10726.

    Example:
        >>> import torch, batchnorm
        >>> net = torch.nn.Sequential(torch.nn.BatchNorm1d(2)).eval()
        >>> x = torch.randn(1000, 2) * 3 + 7
        >>> with batchnorm.adapt(net, "batch") as adapted:
        ...     y = adapted(x)
        >>> y.mean().abs().item() < 1e-3, net[0].running_mean.tolist()
        (True, [0.0, 0.0])
    """
    network = bare(model, "adapt")
    _check_options(method, prior, lr, optimizer)
    found, _ = targets(network, "adapt")
    if method == "tent":
        _affine(found)
    return _Blocks(lambda: _block(network, method, 0.0 if method == "batch" else prior, lr, optimizer))


class _Blocks(AbstractContextManager[Adapted]):
    """What `adapt` gives: every `with` begins another block, and without one there is nothing to call."""

    def __init__(self, begin: Callable[[], AbstractContextManager[Adapted]]) -> None:
        self._begin = begin
        self._running: list[AbstractContextManager[Adapted]] = []

    def __enter__(self) -> Adapted:
        block = self._begin()
        adapted = block.__enter__()
        self._running.append(block)
        return adapted

    def __exit__(self, *error: Any) -> bool | None:
        return self._running.pop().__exit__(*error)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ModelError(
            message(
                "adapt",
                got="a call without a block",
                expected="one inside of it",
                fix="Write `with batchnorm.adapt(model) as adapted:`, and in it adapted(x).",
            )
        )


@contextmanager
def _block(
    network: nn.Module,
    method: Method,
    prior: float,
    lr: float,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None,
) -> Iterator[Adapted]:
    """The `with` block. Which layers take part is seen when it begins: their modes may have changed by then."""
    found, _ = targets(network, "adapt")
    adapted = Adapted(network, found, method, prior)
    trained = _affine(found) if method == "tent" else []
    with Still(network, parameters=tuple(network.parameters())) as still:
        for index, target in enumerate(found):
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                own = getattr(target.module, name)
                if own is not None:
                    still.put(target.module, name, own.clone())
            still.keep(target.module.register_forward_pre_hook(adapted.hook(index), with_kwargs=True))
            target.module.training = method == "tent"
        if method == "tent":
            for parameter in network.parameters():
                parameter.requires_grad_(False)
                parameter.grad = None
            for parameter in trained:
                parameter.requires_grad_(True)
            adapted.optimizer = torch.optim.Adam(trained, lr) if optimizer is None else optimizer(trained)
        adapted._open = True
        try:
            yield adapted
        finally:
            adapted._open, adapted.optimizer = False, None


def _check_options(method: str, prior: float, lr: float, optimizer: object) -> None:
    if method not in METHODS:
        raise InputError(message("method", got=repr(method), expected="'batch', 'blend' or 'tent'"))
    for name, value in (("prior", prior), ("lr", lr)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputTypeError(message(name, got=type(value).__name__, expected="a number"))
        if not 0 <= value < math.inf:
            raise InputError(message(name, got=value, expected="a finite number ≥ 0"))
    if optimizer is not None and not callable(optimizer):
        raise InputTypeError(
            message(
                "optimizer",
                got=type(optimizer).__name__,
                expected="a function that makes one from a list of parameters",
                fix="For example functools.partial(torch.optim.SGD, lr=1e-3).",
            )
        )


def _affine(found: tuple[Target, ...]) -> list[nn.Parameter]:
    layers: list[_BatchNorm] = [target.module for target in found]
    parameters = [
        parameter
        for layer in layers
        for name in (layer._affine_names if isinstance(layer, Extras) else ("weight", "bias"))
        if isinstance(parameter := getattr(layer, name), nn.Parameter)
    ]
    if not parameters:
        raise ModelError(
            message(
                "adapt with method='tent'", got="no batch norm with γ or β", expected="something to train"
            )
        )
    return list(dict.fromkeys(parameters))


def _entropy(output: Any) -> Tensor:
    """Mean over samples of −Σ p log p."""
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] < 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise DataError(
            message("adapt with method='tent': output", got=shape, expected="logits (N, classes)")
        )
    logs = output.log_softmax(1)
    return -(logs.exp() * logs).sum(1).mean()
