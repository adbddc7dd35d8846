"""The C++ extension for CPUs, or the reason in plain words why there is none.

>>> from batchnorm.kernels import cpu
>>> cpu.available() == (cpu.why_not() == "")
True
"""

import importlib
from types import ModuleType

# torch comes first: it brings the OpenMP runtime that the extension then shares, and with it one pool
# of threads whose size torch.set_num_threads sets.
import torch  # noqa: F401

__all__ = ["available", "build_info", "extension", "why_not"]

_NAME = "batchnorm.kernels.cpu._cpu"


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(_NAME), ""
    except ModuleNotFoundError as error:
        if error.name != _NAME:
            return None, f"the compiled CPU extension does not load: {error}"
        return None, (
            "the compiled CPU extension is not installed: there was no C++ compiler when the package was "
            "installed, or it runs from its source folder. Install a compiler (on Debian: apt-get install g++), "
            "then install the package again with pip's options --force-reinstall --no-deps"
        )
    except ImportError as error:
        return None, f"the compiled CPU extension does not load: {error}"


_extension, _why_not = _load()


def available() -> bool:
    """Whether the extension is installed and loads."""
    return _extension is not None


def extension() -> ModuleType | None:
    """The compiled module itself, for the launcher beside this file; None when it is not available."""
    return _extension


def why_not() -> str:
    """Why the extension is not available, in plain words, or an empty string when it is."""
    return _why_not


def build_info() -> dict[str, str | int]:
    """How the extension was built; empty when it is not available.

    Keys: `compiler` (name and version), `cxx_standard` (the value of `__cplusplus`), `openmp` (the
    version of the OpenMP specification as yyyymm, 0 without OpenMP) and `max_threads` (the threads
    that a parallel loop may use now).

    >>> info = build_info()
    >>> not info or info["max_threads"] >= 1
    True
    """
    return {} if _extension is None else dict(_extension.build_info())
