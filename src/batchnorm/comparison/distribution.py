"""How the distribution of a hidden layer's input moves while the network trains."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from batchnorm._errors import InputError, ModelError, message
from batchnorm.comparison.pairs import copied, given
from batchnorm.comparison.record import seeded

__all__ = ["LEVELS", "Percentiles", "Side", "drift", "observe", "percentiles", "typical"]

LEVELS = (0.15, 0.50, 0.85)
"""The levels that are recorded: the ones of figure 1 in Ioffe & Szegedy 2015."""

Side = Literal["input", "output"]


class Percentiles:
    """A recorder of one place in a network: its distribution at every evaluation of a training.

    Figure 1(b, c) in Ioffe, Szegedy: Batch Normalization: Accelerating Deep Network Training by Reducing Internal
    Covariate Shift, ICML 2015, shows it for an input of the last sigmoid layer.

    Args:
        path: the module's path in the model.
        side: its "input" or its "output".
        x: the probe batch, (N, *features): the same at every evaluation.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2))
        >>> recorder = Percentiles("1", "input", torch.randn(16, 4))
        >>> recorder.observe(model)
        >>> recorder.observe(model)
        >>> recorder.curves.shape
        (2, 3, 3)
    """

    def __init__(self, path: str, side: Side, x: Tensor) -> None:
        self._path, self._side, self._x = path, side, x
        self._seen: list[Tensor] = []

    def observe(self, model: nn.Module) -> None:
        """Add one evaluation. It raises what the function `observe` raises, and does not change the model either."""
        self._seen.append(observe(model, self._path, self._side, self._x))

    @property
    def curves(self) -> NDArray[np.float64]:
        """The percentiles, (evaluations, 3, C); (0, 3, 0) before the first one."""
        return torch.stack(self._seen).numpy() if self._seen else np.zeros((0, len(LEVELS), 0))


def observe(model: nn.Module, path: str, side: Side, x: Tensor, seed: int = 0) -> Tensor:
    """The 15th, 50th and 85th percentile of what enters or leaves a module, for each channel, in train mode.

    The channels are axis 1; all other axes are samples. Where the module is called more than once, its first call
    counts.

    Args:
        model: it is copied, and not changed.
        path: the module's path in the model; empty for the model itself.
        side: the module's "input" or its "output".
        x: a batch, (N, *features).
        seed: seeds the generators, so that dropout draws the same mask every time.

    Returns:
        (3, C), float64 on the CPU; NaN in channels that hold a NaN.

    Raises:
        InputError: `side` is something else.
        ModelError: the model has no such module, does not call it, or what is seen there is no tensor with channels
            and samples; or the model cannot be copied.

    Example:
        >>> model = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
        >>> x = torch.tensor([[0.0, 5.0], [10.0, 5.0], [20.0, 5.0]])
        >>> observe(model, "0", "output", x).tolist()
        [[3.0, 5.0], [10.0, 5.0], [17.0, 5.0]]
    """
    if side not in ("input", "output"):
        raise InputError(message("side", got=repr(side), expected="'input' or 'output'"))
    model = copied(model).train()
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise ModelError(
            message("path", got=repr(path), expected="the path of one of the model's modules")
        ) from error
    seen: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not seen:
            seen.append(_percentiles_of(next(iter([*args, *kwargs.values()]), None), path, side))

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not seen:
            seen.append(_percentiles_of(output, path, side))

    # Taken within the hooks: what follows may overwrite the tensor.
    if side == "input":
        module.register_forward_pre_hook(enter, with_kwargs=True)
    else:
        module.register_forward_hook(leave)
    with seeded(seed, x.device), torch.no_grad():
        model(given(model, x))
    if not seen:
        raise ModelError(
            message(f"the module {path!r}", got="no call of it", expected="a forward pass that calls it")
        )
    return seen[0]


def percentiles(values: Tensor, levels: Sequence[float] = LEVELS) -> Tensor:
    """Quantiles of each row, linear between the two nearest values: level p lies at position p·(M − 1) of M.

    Unlike `torch.quantile` it has no limit on the number of values.

    Args:
        values: (C, M) with M ≥ 1.
        levels: between 0 and 1.

    Returns:
        (levels, C), float64; NaN for a row that holds a NaN; next to an infinity it is infinite or NaN.

    Example:
        >>> percentiles(torch.tensor([[30.0, 10.0, 20.0]]), [0.5, 0.75]).tolist()
        [[20.0], [25.0]]
    """
    values = values.to(torch.float64)
    ordered = values.sort(dim=1).values
    last = values.shape[1] - 1
    rows: list[Tensor] = []
    for level in levels:
        below = min(int(level * last), last)
        part = level * last - below
        low, high = ordered[:, below], ordered[:, min(below + (part > 0), last)]
        # Equal ones first: two infinities have no difference.
        rows.append(torch.where(low == high, low, low + (high - low) * part))
    return torch.stack(rows).masked_fill(values.isnan().any(1), torch.nan)


def drift(curves: ArrayLike) -> NDArray[np.float64]:
    """How far each channel's median moves from one evaluation to the next, in units of its spread.

        drift = √(mean over t of (median_{t+1} − median_t)²) / (mean over t of (p85_t − p15_t)/2)

    The unit is σ for normal values, nearly: half of p85 − p15 is 1.04·σ. It depends on how many steps lie between two
    evaluations, so networks are compared over the same ones.

    Args:
        curves: (T, 3, C), the percentiles at T evaluations.

    Returns:
        (C,); NaN for channels without spread or with a value that is not finite, and everywhere if T < 2.

    Raises:
        InputError: another shape.

    Example:
        >>> drift([[[-1.0], [0.0], [1.0]], [[2.0], [3.0], [4.0]]]).tolist()
        [3.0]
    """
    array = np.asarray(curves, dtype=np.float64)
    if array.ndim != 3 or array.shape[1] != len(LEVELS):
        raise InputError(
            message("curves", got=f"shape {array.shape}", expected="shape (evaluations, 3, channels)")
        )
    if len(array) < 2:
        return np.full(array.shape[2], np.nan)
    with np.errstate(all="ignore"):
        moves = np.sqrt(np.mean(np.square(np.diff(array[:, 1], axis=0)), axis=0))
        width = np.mean((array[:, 2] - array[:, 0]) / 2, axis=0)
        known = (width > 0) & np.isfinite(array).all(axis=(0, 1))
        return np.where(known, moves / width, np.nan)


def typical(drifts: ArrayLike) -> int | None:
    """The channel whose drift is the median of the finite ones, the lower of the two middle ones of an even number.

    Of equal drifts the first channel counts.

    Args:
        drifts: (C,), from `drift`.

    Returns:
        The channel's index, or None where no drift is finite.

    Example:
        >>> typical([0.3, float("nan"), 0.1, 0.2, 0.9])
        3
    """
    array = np.asarray(drifts, dtype=np.float64)
    finite = np.flatnonzero(np.isfinite(array))
    if not finite.size:
        return None
    ordered = finite[np.argsort(array[finite], kind="stable")]
    middle = array[ordered[(finite.size - 1) // 2]]
    return int(np.flatnonzero(array == middle)[0])


def _percentiles_of(value: Any, path: str, side: Side) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() < 2 or not value.numel():
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ModelError(
            message(f"the {side} of {path!r}", got=got, expected="a tensor of channels (axis 1) and samples")
        )
    return percentiles(value.detach().transpose(0, 1).reshape(value.shape[1], -1).cpu())
