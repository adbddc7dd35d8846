"""What a computation ran on: versions, processor, devices, threads, and the backend of each device."""

import importlib.util
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from batchnorm.ops import explain_backend

__all__ = ["Device", "Environment", "describe"]

_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Device:
    """A device, and the backend that runs a training step on it for a float32 input of shape (N, C).

    `why` says why that backend was chosen, `refused` maps each backend that cannot run the call to
    its reason. `backend` is empty, and `why` the error, for a device that does not answer.
    """

    name: str
    model: str
    backend: str
    why: str
    refused: dict[str, str]


@dataclass(frozen=True)
class Environment:
    """Versions, processor, threads and devices of this process."""

    batchnorm: str
    python: str
    torch: str
    numpy: str
    system: str
    cpu: str
    cores: int
    threads: int
    extension: str
    devices: tuple[Device, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the environment as plain dictionaries and lists."""
        return {**asdict(self), "devices": [asdict(device) for device in self.devices]}

    def to_json(self) -> str:
        """Return the environment as JSON, with its kind and the version of its structure in front.

        Example:
            >>> from batchnorm._environment import describe
            >>> '"kind": "environment"' in describe().to_json()
            True
        """
        content = {"kind": "environment", "schema_version": _SCHEMA_VERSION, **self.to_dict()}
        return json.dumps(content, indent=2, ensure_ascii=False)


def describe() -> Environment:
    """Look at this machine and process. CUDA is initialized only where there is a CUDA device.

    Example:
        >>> from batchnorm._environment import describe
        >>> describe().devices[0].name
        'cpu'
    """
    import numpy
    import torch

    cpu = _cpu_model()
    return Environment(
        # Not imported by name: the package's root names every layer above this one.
        batchnorm=sys.modules[__package__].__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=numpy.__version__,
        system=platform.platform(aliased=True, terse=False),
        cpu=cpu,
        cores=_usable_cores(),
        threads=torch.get_num_threads(),
        extension=_extension(),
        devices=tuple(_device(name, cpu) for name in _device_names()),
    )


def _device_names() -> list[str]:
    import torch

    names = ["cpu"]
    if torch.cuda.is_available():
        names += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return names


def _device(name: str, cpu: str) -> Device:
    import torch

    try:
        model = torch.cuda.get_device_name(name) if name.startswith("cuda") else cpu
        choice = explain_backend(torch.empty(2, 1, device=name))
    except RuntimeError as error:  # a driver that does not fit, a card that is full or taken
        reason = str(error).strip().partition("\n")[0]
        return Device(name, model="unknown", backend="", why=reason, refused={})
    chosen = next(candidate for candidate in choice.candidates if candidate.name == choice.chosen)
    names = [candidate.name for candidate in choice.candidates if not candidate.waits or candidate is chosen]
    why = f"the first of {', '.join(names)} that can run the call; {chosen.note}"
    refused = {
        candidate.name: candidate.refused for candidate in choice.candidates if candidate.refused is not None
    }
    return Device(name, model=model, backend=choice.chosen, why=why, refused=refused)


def _extension() -> str:
    """Return whether the compiled CPU kernels are installed, and whether they run."""
    import torch

    # By name and without loading it: only `ops` knows what lies in there.
    if importlib.util.find_spec("batchnorm.kernels.cpu._cpu") is None:
        return "not installed: training runs on PyTorch's own kernels, several times slower and less exact"
    for candidate in explain_backend(torch.empty(2, 1)).candidates:
        if candidate.name == "cpu":
            return f"installed, not used: {candidate.refused}" if candidate.refused else "installed, in use"
    return "installed, not used"


def _usable_cores() -> int:
    """Return the cores that this process may use: a container or a batch system often grants fewer."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    if sys.platform == "linux":
        info = Path("/proc/cpuinfo")
        for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            return answer.stdout.strip()
    return platform.processor() or platform.machine()
