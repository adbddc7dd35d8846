"""Whole-file writes, interruptions that wait for them, and optional imports that say how to install what is missing."""

import contextlib
import importlib
import importlib.util
import os
import signal
import stat
import tempfile
import threading
from pathlib import Path
from types import FrameType, ModuleType, TracebackType
from typing import Any, Self

from batchnorm._errors import MissingDependencyError, OutputError, message

__all__ = ["Interrupts", "check_writable", "package_file", "require", "write_whole"]


def require(module: str, *, package: str, purpose: str) -> ModuleType:
    """Import an optional module, or say exactly which command installs it.

    Args:
        module: what to import.
        package: its name in the package index. The command names it, and no extra of this package, because that works
            however batchnorm was installed.
        purpose: what needs it.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{purpose} needs the package {package}, which is not installed. Run: pip install {package}"
        ) from error


def package_file(module: str, name: str, *, package: str, purpose: str) -> Path:
    """A file that another package carries, found without importing that package, which may ask for many others.

    Args:
        module: the package's import name.
        name: the file's path below the package's folder.
        package: what pip must be told to install it.
        purpose: what needs it.

    Raises:
        MissingDependencyError: the package is not installed, or does not hold the file.
    """
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None or not (path := Path(found.origin).parent / name).is_file():
        raise MissingDependencyError(
            f"{purpose} is the file {name} of the package {module}, which is not installed. "
            f"Run: pip install {package}"
        )
    return path


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Raise now, before long work, if a file at `path` could not be written later.

    Raises:
        OutputError: a folder, a missing folder, no permission, a name that the file system does not take.
    """
    given = Path(path)
    target, direct = _place(given)
    if not direct:
        try:
            handle, name = _temporary(target.parent)
        except OSError as error:
            raise _unwritable(given, error) from error
        os.close(handle)
        os.unlink(name)
    return given


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file so that it appears whole or not at all (temporary file in the same folder, then rename).

    A symbolic link stays one, and a file that is there keeps its permissions. A device or a pipe is written directly.

    Raises:
        OutputError: it cannot be written.
    """
    given = Path(path)
    target, direct = _place(given)
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        if direct:
            with open(_open(target), "wb") as file:
                file.write(data)
        else:
            _replace(target, data)
    except OSError as error:
        raise OutputError(f"cannot write {given}: {error.strerror or error}. Choose another path.") from error
    return given


def _replace(target: Path, data: bytes) -> None:
    handle, name = _temporary(target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            mode = stat.S_IMODE(target.stat().st_mode)
        except FileNotFoundError:
            mode = 0o666 & ~_umask()
        os.chmod(name, mode)
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _open(target: Path) -> int:
    # /dev/stdout opened anew would start at the file's beginning, and later output would overwrite what is written.
    number = {"/dev/stdout": "1", "/dev/stderr": "2"}.get(str(target)) or str(target).removeprefix("/dev/fd/")
    if number.isdecimal():
        return os.dup(int(number))
    return os.open(target, os.O_WRONLY | os.O_APPEND)


def _temporary(folder: Path) -> tuple[int, str]:
    # Not named after the target, whose name may already be as long as names can be.
    return tempfile.mkstemp(prefix=".batchnorm-", dir=folder)


def _place(path: Path) -> tuple[Path, bool]:
    """Where `path` leads, symbolic links resolved, and whether that is written directly: a device or a pipe."""
    try:
        found = _status(path)
        if found is not None and stat.S_ISDIR(found.st_mode):
            raise OutputError(
                message(
                    "output path", got=f"the folder {path}", expected="a file name", fix="Add a file name."
                )
            )
        # What stands under /dev belongs to the system, even where /dev/stdout leads to a regular file.
        direct = found is not None and (not stat.S_ISREG(found.st_mode) or path.parts[:2] == ("/", "dev"))
        target = path if direct else path.resolve()
        folder = None if direct else _status(target.parent)
    except (OSError, RuntimeError, ValueError) as error:
        # RuntimeError: links that lead in a circle; ValueError: a zero byte in the name.
        raise (error if isinstance(error, OutputError) else _unwritable(path, error)) from error
    if not direct and (folder is None or not stat.S_ISDIR(folder.st_mode)):
        raise OutputError(
            message(
                "output path",
                got=str(path),
                expected="a file in a folder that exists",
                fix=f"Create it first: mkdir -p {path.parent if not path.is_symlink() else target.parent}",
            )
        )
    if found is not None and not os.access(target, os.W_OK):
        raise _unwritable(path, "no permission")
    return target, direct


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _unwritable(path: Path, reason: Exception | str) -> OutputError:
    text = getattr(reason, "strerror", None) or str(reason)
    return OutputError(
        message("output path", got=f"{path} ({text})", expected="a writable file", fix="Choose another.")
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class Interrupts:
    """Ctrl-C that stops the work once and then waits until the results are safe.

    As a context manager: the first Ctrl-C raises KeyboardInterrupt, as always; later ones, and all after `hold`, are
    only counted, until the block ends or `PATIENCE` of them show that someone really wants to leave. Blocks may be
    nested: the outer one goes on as the inner one ended. Elsewhere than in the main thread, or where the process has
    a handler of its own, nothing is changed.

    Example:
        >>> with Interrupts() as interrupts:
        ...     interrupts.hold()
        ...     signal.raise_signal(signal.SIGINT)  # someone presses Ctrl-C
        >>> interrupts.pressed
        1
    """

    PATIENCE = 4

    def __init__(self) -> None:
        self.pressed = 0
        self.holding = False
        self._before: Any = None
        self._installed = False

    def hold(self) -> None:
        """Let Ctrl-C wait from now on."""
        self.holding = True

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.getsignal(signal.SIGINT)
            if self._before is signal.default_int_handler or self._outer() is not None:
                signal.signal(signal.SIGINT, self._on_signal)
                self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._installed:
            return
        outer = self._outer()
        if outer is not None:
            outer.pressed += self.pressed
            outer.holding = outer.holding or self.holding
        signal.signal(signal.SIGINT, self._before)
        self._installed = False

    def _outer(self) -> "Interrupts | None":
        owner = getattr(self._before, "__self__", None)
        return owner if isinstance(owner, Interrupts) else None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.pressed += 1
        if self.holding and self.pressed < self.PATIENCE:
            return
        self.holding = True
        raise KeyboardInterrupt
