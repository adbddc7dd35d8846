"""Numbers and names in words, the same in every sentence and table of a report."""

from collections.abc import Sequence

from batchnorm.bench.record import Timing
from batchnorm.bench.statistics import percentile
from batchnorm.bench.suites import SUITES

__all__ = [
    "FOLLOWED",
    "MALLOC",
    "NAME",
    "OPERATION",
    "RIVAL",
    "exponent",
    "network",
    "percent",
    "seconds",
    "spread",
    "spread_of",
]

OPERATION = {
    "forward": "forward",
    "forward+backward": "fwd + bwd",
    "inference": "inference",
}
RIVAL = {
    "eager": "torch.nn",
    "compile": "torch.compile",
    "cudnn": "cuDNN's fused graph",
    "plain": "our layer without synchronization",
    "torch-sync": "torch.nn.SyncBatchNorm",
}
NAME = {
    "batchnorm": "ours",
    "eager": "torch",
    "compile": "compile",
    "cudnn": "cuDNN",
    "plain": "plain",
    "torch-sync": "torch",
}
MALLOC = {"as-is": "malloc as is", "raised": "malloc raised"}
FOLLOWED = {
    "none": "alone",
    "relu": "ReLU",
    "relu6": "ReLU6",
    "residual": "add",
    "residual+relu": "add + ReLU",
    "all": "all of it",
}


def seconds(value: float) -> str:
    """A time with three digits and the unit that suits it.

    Example:
        >>> seconds(2.5e-6), seconds(0.01234), seconds(3.0)
        ('2.50 µs', '12.3 ms', '3.00 s')
    """
    number, unit = _scaled(value)
    return f"{_digits(number)} {unit}"


def spread(timing: Timing) -> str:
    """Median and the 20th and 80th percentile, as "12.3 (11.9–12.8) ms"."""
    return _spread(timing.p20, timing.p50, timing.p80)


def spread_of(samples: Sequence[float]) -> str:
    """The same of samples.

    Example:
        >>> spread_of([0.010, 0.011, 0.012])
        '11.0 (10.4–11.6) ms'
    """
    return _spread(*(percentile(samples, share) for share in (0.2, 0.5, 0.8)))


def _spread(p20: float, p50: float, p80: float) -> str:
    _, unit = _scaled(p50)
    factor = {"µs": 1e6, "ms": 1e3, "s": 1.0}[unit]
    low, middle, high = (_digits(value * factor) for value in (p20, p50, p80))
    return f"{middle} ({low}–{high}) {unit}"


def percent(share: float | None) -> str:
    """0.93 as "93 %"."""
    return "–" if share is None else f"{100 * share:.0f} %"


def exponent(value: float | None) -> str:
    """An error as "1.2e-7"; "0" for none."""
    if value is None:
        return "–"
    mantissa, _, power = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(power)}" if value and power else ("0" if value == 0 else "NaN")


def network(suite: str, layout: str, dtype: str) -> str:
    """What a table is about, as "ResNet-50, contiguous, float32"."""
    return f"{SUITES[suite].title}, {layout}, {dtype}"


def _scaled(value: float) -> tuple[float, str]:
    if value < 1e-3:
        return value * 1e6, "µs"
    return (value * 1e3, "ms") if value < 1 else (value, "s")


def _digits(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
