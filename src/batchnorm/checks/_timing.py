"""How long the costliest batch norms take, as they are and in other ways."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.checks._alone import copy_of, input_for, is_plain
from batchnorm.checks._watching import Norms
from batchnorm.checks.evidence import Seen
from batchnorm.nn.batch_norm import Extras
from batchnorm.nn.families import FAMILIES, family_of

__all__ = ["CHANNELS_LAST", "OURS", "timed"]

CHANNELS_LAST = "channels-last"
OURS = "this package's layer"
_LAYERS, _RUNS = 2, 5
# Elements of an input: 16 MB in float32, larger than most second-level caches; a few ms each on two cores.
_MOST = 1 << 22
# Below, the time is that of the call, and on a busy machine of threads that wait for one another.
_LEAST = 1 << 16

_Ways = dict[str, tuple[_BatchNorm, Tensor]]


def timed(norms: Norms, seen: Mapping[str, Seen]) -> dict[str, Seen]:
    """The same notes, with the factor of the costliest layers over the fastest way to compute them here."""
    found = dict(seen)
    layers = dict(norms)
    able = [name for name, each in seen.items() if each.training and each.train and is_plain(layers[name])]
    able = [name for name in able if torch.Size(seen[name].shape).numel() >= _LEAST]
    able.sort(key=lambda name: _cost(seen[name]), reverse=True)
    for name in able[:_LAYERS]:
        ways = _ways(layers[name], seen[name])
        if len(ways) > 1:
            slow, faster = _compared(ways)
            found[name] = replace(seen[name], slow=slow, faster=faster)
    return found


def _cost(seen: Seen) -> int:
    calls = max(call.site for call in seen.train) + 1
    return torch.Size(seen.shape).numel() * calls


def _ways(layer: _BatchNorm, seen: Seen) -> _Ways:
    """The layer as it is, under "", and the other ways."""
    x = input_for(layer, seen, _MOST)
    if x is None or x.shape[0] * x.shape[2:].numel() < 2:
        return {}
    ways: _Ways = {"": (copy_of(layer), x)}
    other = None
    if x.dim() in (4, 5) and not seen.channels_last:
        other = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
        ways[CHANNELS_LAST] = (copy_of(layer), other)
    family = family_of(type(layer))
    if not isinstance(layer, Extras) and family is not None and x.dim() - 1 <= 4:
        made = _ours(layer, family[1])
        ways[OURS] = (made, x)
        if other is not None:
            ways[f"{OURS} in {CHANNELS_LAST}"] = (_ours(layer, family[1]), other)
    return ways


def _ours(layer: _BatchNorm, axes: int) -> _BatchNorm:
    made = FAMILIES["batchnorm"].classes[axes](
        layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
    )
    place = next(layer.parameters(), next(layer.buffers(), None))
    return made if place is None else made.to(place.device, place.dtype)  # type: ignore[return-value]


def _compared(ways: _Ways) -> tuple[float | None, str]:
    """How many times as long as the fastest way, by the median and by the fastest run, and that way."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    try:
        for run in range(_RUNS + 1):
            for way, (layer, x) in ways.items():
                spent = _step(layer, x)
                if run:  # the first one pays for memory and for what is set up once
                    times[way].append(spent)
    except (RuntimeError, NotImplementedError):  # what runs under the user's autocast need not run alone
        return None, ""
    best = min((way for way in ways if way), key=lambda way: statistics.median(times[way]))
    by_median = statistics.median(times[""]) / statistics.median(times[best])
    return min(by_median, min(times[""]) / min(times[best])), best


def _step(layer: _BatchNorm, x: Tensor) -> float:
    input = x.detach().requires_grad_()
    dy = torch.ones_like(x)
    _wait(x)
    begin = time.perf_counter()
    with torch.enable_grad():
        layer(input).backward(dy)
    _wait(x)
    return time.perf_counter() - begin


def _wait(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    elif x.device.type == "mps":
        torch.mps.synchronize()
