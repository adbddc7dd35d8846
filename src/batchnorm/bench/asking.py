"""The first question to a worker: what the machine is, and whether what is asked for can run there."""

from collections.abc import Sequence
from typing import Any

from batchnorm._errors import BackendError, InputError, message
from batchnorm.bench import process
from batchnorm.bench.process import WorkerError

__all__ = ["ask_machine"]


def ask_machine(
    device: str, dtypes: Sequence[str], backend: str | None, threads: int | None, *, copy: bool = True
) -> dict[str, Any]:
    """The header under "machine" and, where `copy` asks for it, the speed of a copy under "copy".

    Raises:
        InputError: the device does not answer.
        BackendError: the backend that is asked for cannot run there.
    """
    job = {
        "task": "machine",
        "device": device,
        "threads": threads,
        "dtypes": list(dtypes),
        "backend": backend,
        "measure_copy": copy,
    }
    try:
        (answer,) = process.work(job)
    except WorkerError as error:
        raise InputError(
            message("device", got=device, expected="a device that answers", fix=str(error))
        ) from error
    if answer.get("refused"):
        raise BackendError(
            message(
                f"--backend {backend} on {device}",
                got=answer["refused"],
                expected="a backend that can run there",
                fix="Leave it out for the usual choice, or ask batchnorm.explain_backend which backends can.",
            )
        )
    return answer
