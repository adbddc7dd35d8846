"""What a user should be told about a recalibration."""

from collections.abc import Sequence

from batchnorm.stats._passes import Passed
from batchnorm.stats._targets import Target

__all__ = ["notes"]

# With K ≥ 8 blocks of independent samples the ratio passes 4 by chance less than once in 10,000 times.
_UNLIKE = 4.0
_BLOCKS = 8
# Measured on a network of six layers: with shuffled batches of 64 one pass is off by 0.003 σ, of 8 by 0.03 σ.
_SMALL = 32


def notes(passed: Passed, found: Sequence[Target], mode: str, unsettled: Sequence[int]) -> tuple[str, ...]:
    """Sentences; most runs need none."""
    told = []
    deep = len(passed.order) > 1 and mode == "joint"
    worst = max(passed.order, key=lambda index: passed.effects[index])
    if passed.effects[worst] > _UNLIKE and passed.rounds >= _BLOCKS:
        behind = " The layers behind the first saw inputs made with such batches: use mode='sequential'."
        told.append(
            f"the data come in stretches that differ, as in a sorted stream: at {_name(found[worst])} the mean is as "
            f"uncertain as if there were {passed.effects[worst]:.0f} times fewer samples.{behind if deep else ''}"
        )
    elif deep and passed.samples < _SMALL * passed.batches:
        told.append(
            f"batches of {passed.samples / passed.batches:.0f} samples: the layers behind the first saw inputs made "
            "with noisy batch statistics. Use larger batches or mode='sequential'."
        )
    told += [
        f"{_name(found[index])} is fed by its own output, and its statistics did not settle"
        for index in unsettled
    ]
    return tuple(told)


def _name(target: Target) -> str:
    return target.name or "the model"
