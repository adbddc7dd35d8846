"""Whole-file writes, and optional imports that say how to install what is missing."""

import contextlib
import importlib
import os
import tempfile
from pathlib import Path
from types import ModuleType

from batchnorm._errors import MissingDependencyError, OutputError, message

__all__ = ["check_writable", "require", "write_whole"]


def require(module: str, *, package: str, extra: str | None = None, purpose: str) -> ModuleType:
    """Import an optional module, or say exactly which command installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        target = f"'batchnorm[{extra}]'" if extra else package
        raise MissingDependencyError(
            f"{purpose} needs the package {package}, which is not installed. Run: pip install {target}"
        ) from error


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Raise now, before long work, if a file at `path` could not be written later."""
    target = Path(path)
    folder = target.parent
    if target.is_dir():
        raise OutputError(
            message("output path", got=f"the folder {target}", expected="a file name", fix="Add a file name.")
        )
    if not folder.is_dir():
        raise OutputError(
            message(
                "output path",
                got=str(target),
                expected="a file in a folder that exists",
                fix=f"Create it first: mkdir -p {folder}",
            )
        )
    if not os.access(folder, os.W_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise OutputError(
            message(
                "output path",
                got=f"{target} (no permission)",
                expected="a writable file",
                fix="Choose another.",
            )
        )
    return target


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file so that it appears whole or not at all (temporary file in the same folder, then rename)."""
    target = check_writable(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
    except OSError as error:
        raise OutputError(
            f"cannot write {target}: {error.strerror or error}. Choose another path."
        ) from error
    return target


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
