"""What came of a case: times, errors, and the figures that follow from them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from batchnorm.bench.case import Case, counted_tensors
from batchnorm.bench.statistics import median

__all__ = ["FUSED", "GRAPH", "LAUNCHED", "OURS", "PLAIN", "REMOVED", "Record", "Timing"]

OURS = "batchnorm"
# Who takes whole training steps, and how a step gets to the device.
PLAIN, FUSED, REMOVED = "plain", "fused", "removed"
LAUNCHED, GRAPH = "launched", "graph"


@dataclass(frozen=True)
class Timing:
    """Seconds a call: percentiles over all samples, and the median of each round.

    `faults` is how many pages of memory the process got from the system in a call: new memory that had to be mapped
    and cleared. None where the system does not say. `replayed`, on a GPU, is whether a CUDA graph was replayed, so that
    the time is the kernels' alone; else the host launched them.
    """

    p20: float
    p50: float
    p80: float
    rounds: tuple[float, ...]
    faults: float | None
    replayed: bool | None = None


@dataclass(frozen=True)
class Record:
    """A case that is finished: measured, or failed with a reason and without times.

    Args:
        case: what was measured.
        failure: what is wrong with our layer, or why its process ended early; empty where all is well.
        backends: which backend ran our layer in "training" and in "inference".
        skipped: rivals that could not run here, and why; "NAME in OPERATION" where one operation alone could not.
        errors: of each contender, max|got − exact| / max|exact| against float64: "y", "dx", "dweight", "dbias",
            "y of inference" and, where there is a residual, "dresidual".
        times: operation -> contender -> its times.
    """

    case: Case
    failure: str = ""
    backends: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    times: Mapping[str, Mapping[str, Timing]] = field(default_factory=dict)

    @classmethod
    def read(cls, case: Case, answer: Mapping[str, Any]) -> "Record":
        """From a worker's answer."""
        times = {
            operation: {
                name: Timing(**{**fields, "rounds": tuple(fields["rounds"])})
                for name, fields in contenders.items()
            }
            for operation, contenders in answer.get("times", {}).items()
        }
        return cls(case, **{**answer, "times": times})

    def ratio(self, operation: str, rival: str) -> float | None:
        """The rival's time over ours, above 1 where ours is faster: the median over rounds, each with both in it."""
        contenders = self.times.get(operation, {})
        if OURS not in contenders or rival not in contenders:
            return None
        pairs = zip(contenders[rival].rounds, contenders[OURS].rounds, strict=True)
        return median([theirs / ours for theirs, ours in pairs])

    def speed(self, operation: str, contender: str = OURS) -> float | None:
        """Counted bytes a second."""
        timing = self.times.get(operation, {}).get(contender)
        if timing is None:
            return None
        return counted_tensors(operation, self.case.epilogue) * self.case.bytes / timing.p50

    def error(self, contender: str) -> float | None:
        """The larger of the errors of y and dx."""
        found = [value for name, value in self.errors.get(contender, {}).items() if name in ("y", "dx")]
        return max(found) if found else None

    def to_dict(self, copy: float) -> dict[str, Any]:
        """Plain data; seconds, bytes a second, and shares of the speed of a copy."""
        operations = {}
        for operation, contenders in self.times.items():
            rivals = [name for name in contenders if name != OURS]
            operations[operation] = {
                "counted_bytes": counted_tensors(operation, self.case.epilogue) * self.case.bytes,
                "times": {name: asdict(timing) for name, timing in contenders.items()},
                "ratio": {name: self.ratio(operation, name) for name in rivals},
                "bytes_per_second": {name: self.speed(operation, name) for name in contenders},
                "share_of_copy": {name: (self.speed(operation, name) or 0.0) / copy for name in contenders},
            }
        return {
            **asdict(self.case),
            "bytes": self.case.bytes,
            "failure": self.failure,
            "backends": dict(self.backends),
            "skipped": dict(self.skipped),
            "errors": {name: dict(found) for name, found in self.errors.items()},
            "operations": operations,
        }
