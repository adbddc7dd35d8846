"""`Recalibration`: what was done to the running statistics, and how to take it back."""

import html
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from batchnorm._errors import ModelError, message
from batchnorm._files import write_whole
from batchnorm._walk import Skipped, html_table
from batchnorm.stats._passes import Stopped
from batchnorm.stats._targets import Target

__all__ = ["RecalibratedLayer", "Recalibration"]

_STOPPED = {
    "tolerance": "every mean was known well enough",
    "samples": "as many as asked for",
    "end": "the loader ended",
}


@dataclass(frozen=True, eq=False)
class RecalibratedLayer:
    """One batch norm: its statistics before and after, float64 on the CPU, as they are stored.

    Args:
        name: the layer's name in the model; `also` holds its further ones.
        also: further names of the same layer.
        count: values (with a mask: the sum of the weights) in each channel.
        mean_before: running mean, (C,).
        var_before: running variance, (C,).
        mean: the new running mean, (C,).
        var: the new running variance, (C,).
        eps: the layer's ε.
        precision: half the 95 % confidence interval of the mean in σ, that of the widest channel.
        design_effect: how many times more samples were needed than of independent ones; far above 1 where one stretch
            of the stream differs from the next.
    """

    name: str
    also: tuple[str, ...]
    count: float
    mean_before: Tensor
    var_before: Tensor
    mean: Tensor
    var: Tensor
    eps: float
    precision: float
    design_effect: float

    @property
    def shift(self) -> float:
        """The largest |new mean − old mean| / √(new var + ε) of a channel; inf where the old was not finite."""
        shift = (self.mean - self.mean_before).abs() / (self.var + self.eps).sqrt()
        return float(torch.where(shift.isfinite(), shift, math.inf).max())

    @property
    def scale(self) -> float:
        """√((new var + ε) / (old var + ε)) of the channel where it is farthest from 1; inf where it is not finite."""
        ratio = ((self.var + self.eps) / (self.var_before + self.eps)).sqrt()
        distance = torch.where(ratio > 0, ratio.log().abs(), math.inf)
        where = int(torch.where(distance.isfinite(), distance, math.inf).argmax())
        return float(ratio[where]) if math.isfinite(float(distance[where])) else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers."""
        tensors = ("mean_before", "var_before", "mean", "var")
        numbers = ("count", "eps", "precision", "design_effect", "shift", "scale")
        return {
            "name": self.name,
            "also": list(self.also),
            **{name: getattr(self, name) for name in numbers},
            **{name: getattr(self, name).tolist() for name in tensors},
        }


@dataclass(eq=False, repr=False)
class Recalibration:
    """What `recalibrate` did to a model.

    Args:
        layers: the layers whose running statistics are new, in the order of the model.
        skipped: the layers that were left alone, and why.
        samples: how many samples a pass took, over all processes.
        batches: how many batches that were.
        stopped_by: "tolerance" (every mean is known well enough), "samples" (as many as asked for) or "end" (of the
            loader).
        passes: how many times the data went through the model.
        mode: "joint" or "sequential".
        tolerance: what was asked for, in σ.
        notes: what one should know about this run.

    Example:
        >>> import torch, batchnorm
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.ReLU())
        >>> result = batchnorm.recalibrate(net, [torch.randn(64, 2) + 5 for _ in range(4)])
        >>> result.samples, result.stopped_by, [layer.name for layer in result.layers]
        (256, 'end', ['0'])
        >>> result.revert()
        >>> net[0].running_mean
        tensor([0., 0.])
    """

    kind: ClassVar[str] = "recalibration"
    schema_version: ClassVar[int] = 1

    layers: tuple[RecalibratedLayer, ...]
    skipped: tuple[Skipped, ...]
    samples: int
    batches: int
    stopped_by: Stopped
    passes: int
    mode: str
    tolerance: float
    notes: tuple[str, ...] = ()
    _before: tuple[tuple[Target, Tensor, Tensor, Tensor | None], ...] = field(default=(), repr=False)

    @property
    def precision(self) -> float:
        """Half the widest 95 % confidence interval of a mean, in σ, the data taken as a random sample."""
        return max(layer.precision for layer in self.layers)

    @property
    def shift(self) -> float:
        """The largest move of a mean, in σ."""
        return max(layer.shift for layer in self.layers)

    def revert(self) -> None:
        """Put the statistics of before back, bit by bit. Reverting twice does nothing more.

        Raises:
            ModelError: a layer has lost its running statistics since; nothing is reverted then.
        """
        for target, *_ in self._before:
            if target.module.running_mean is None or target.module.running_var is None:
                raise ModelError(
                    message(
                        f"revert of recalibrate: {target.name or 'model'}",
                        got="a layer without running statistics",
                        expected="the layer as recalibrate left it",
                    )
                )
        with torch.no_grad():
            for target, mean, var, counter in self._before:
                layer = target.module
                for own, old in ((layer.running_mean, mean), (layer.running_var, var)):
                    if own is not None:
                        own.copy_(old)
                if layer.num_batches_tracked is not None and counter is not None:
                    layer.num_batches_tracked.copy_(counter)
        self._before = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dictionaries, lists and numbers."""
        return {
            "mode": self.mode,
            "samples": self.samples,
            "batches": self.batches,
            "passes": self.passes,
            "stopped_by": self.stopped_by,
            "tolerance": self.tolerance,
            "precision": self.precision,
            "layers": [layer.to_dict() for layer in self.layers],
            "skipped": [{"name": s.name, "also": list(s.also), "reason": s.reason} for s in self.skipped],
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """Everything as strict JSON with `kind` and `schema_version`; NaN and infinities become null."""
        head = {"schema_version": self.schema_version, "kind": self.kind}
        return json.dumps({**head, **_finite(self.to_dict())}, indent=2, ensure_ascii=False, allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report to a file, whole or not at all: JSON for `.json`, HTML for `.html`, else plain text.

        Raises:
            OutputError: the file cannot be written.
        """
        suffix = Path(path).suffix.lower()
        if suffix == ".json":
            return write_whole(path, self.to_json() + "\n")
        if suffix in {".html", ".htm"}:
            title = f"<title>{html.escape(self.headline)}</title>"
            head = f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">{title}</head>'
            return write_whole(path, f"{head}\n<body>\n{self._repr_html_()}\n</body>\n</html>\n")
        return write_whole(path, f"{self}\n")

    @property
    def headline(self) -> str:
        """The result in one line."""
        layers = f"{len(self.layers)} layer{'s' if len(self.layers) > 1 else ''}"
        passes = f", {self.passes} passes" if self.passes > 1 else ""
        samples = f"{self.samples:,} sample{'' if self.samples == 1 else 's'}"
        known = f"means known to ±{self.precision:.2g} σ"
        if not math.isfinite(self.precision):
            known = "one sample: means not known"
        return (
            f"recalibrated {layers} ({self.mode}{passes}) on {samples}: {_STOPPED[self.stopped_by]}; {known}"
        )

    def _rows(self) -> list[tuple[str, str, str, str]]:
        return [
            (
                " = ".join(each or "(the model itself)" for each in (layer.name, *layer.also)),
                _number(layer.shift, "was not finite"),
                _number(layer.scale, "was not finite"),
                _number(layer.precision, "unknown"),
            )
            for layer in self.layers
        ]

    def __repr__(self) -> str:
        return f"Recalibration({self.headline})"

    def __str__(self) -> str:
        head = ("layer", "mean moved, σ", "std became, ×", "mean known to ±, σ")
        rows = [head, *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [self.headline]
        for row in rows:
            first, *rest = (
                cell.ljust(width) if not column else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            lines.append(f"  {'  '.join([first, *rest])}".rstrip())
        if self.skipped:
            lines.append("left alone:")
            lines += [f"  {skip.name or '(the model itself)'}: {skip.reason}" for skip in self.skipped]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def _repr_html_(self) -> str:
        head = ("layer", "mean moved, σ", "standard deviation became, ×", "mean known to ±, σ")
        parts = [f"<p><strong>{html.escape(self.headline)}</strong></p>"]
        parts += html_table(head, self._rows())
        parts += html_table(("left alone", "why"), [(s.name, s.reason) for s in self.skipped])
        parts += [f"<p><small>{html.escape(note)}</small></p>" for note in self.notes]
        return "\n".join(parts)


def _number(value: float, otherwise: str) -> str:
    return f"{value:.3g}" if math.isfinite(value) else otherwise


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value
