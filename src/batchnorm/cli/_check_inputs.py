"""What `batchnorm check` is given on the command line, made into what `batchnorm.check` takes."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm._errors import InputError, message
from batchnorm.cli._output import stderr, users_code

if TYPE_CHECKING:
    from torch import nn

    from batchnorm.checks import Findings

__all__ = ["Inputs"]


@dataclass(frozen=True)
class Inputs:
    """The options that say what is checked; those after `weights` are None where they are not given."""

    model: str
    batches: int
    device: str
    select: list[str] | None
    ignore: list[str] | None
    weights: Path | None = None
    data: str | None = None
    optimizer: str | None = None
    averaged: Path | None = None
    world_size: int | None = None

    @property
    def files(self) -> list[Path]:
        """What is read, and so must not be written to."""
        return [file for file in (Path(self.model), self.weights, self.averaged) if file is not None]

    def findings(self) -> "Findings":
        """Make the model and all that goes with it, and check it."""
        from batchnorm.checks.rule import chosen
        from batchnorm.cli._factory import is_spec

        chosen(self.select, self.ignore)  # a misspelled code is told before the model is made
        is_file = Path(self.model).exists() or not is_spec(self.model)
        found = self._of_file() if is_file else self._of_model()
        if self.select is not None and found.not_run and not found.ran:
            from batchnorm.cli._findings import unseen

            raise InputError(
                message(
                    "--select",
                    got=", ".join(self.select),
                    expected="a rule that can look at what is given",
                    fix=f"Not looked at: {unseen(found.not_run)}.",
                )
            )
        return found

    def _of_file(self) -> "Findings":
        import batchnorm
        from batchnorm.cli._weights import read_state

        source = self.model
        if not Path(source).exists():
            raise InputError(
                message(
                    "MODEL",
                    got=f"{source!r}, no such file",
                    expected="MODULE:FACTORY, or a file with weights",
                    fix=f"A function is given with its module, as in {_as_spec(source)}.",
                )
            )
        if Path(source).suffix == ".py":
            raise InputError(
                message(
                    "MODEL",
                    got=f"{source}, a file with code",
                    expected="MODULE:FACTORY, or a file with weights",
                    fix=f"Give the function in it: {Path(source).stem}:FACTORY.",
                )
            )
        self._refuse_beside_file()
        return batchnorm.check(read_state(Path(source), "MODEL"), select=self.select, ignore=self.ignore)

    def _refuse_beside_file(self) -> None:
        for name in ("data", "weights", "optimizer", "averaged", "world_size"):
            value = getattr(self, name)
            if value is not None:
                raise InputError(
                    message(
                        f"--{name.replace('_', '-')}",
                        got=f"{value} beside the checkpoint {self.model}",
                        expected="a model to go with it",
                        fix=f"batchnorm check MODULE:FACTORY --weights {self.model}.",
                    )
                )

    def _of_model(self) -> "Findings":
        import batchnorm

        network = self._model()
        given: dict[str, Any] = {
            "optimizer": self._optimizer(network),
            "averaged": self._averaged(network),
            "world_size": self.world_size,
            "select": self.select,
            "ignore": self.ignore,
        }
        if self.data is None:
            return batchnorm.check(network, **given)
        from batchnorm.checks._batches import forwards
        from batchnorm.cli._check_progress import CheckDisplay
        from batchnorm.cli._factory import load_data

        with users_code():
            loader = _training(load_data(self.data, "--data"), self.data)
        with CheckDisplay(stderr()) as display, users_code():
            number = min(self.batches, _length(loader, self.batches))
            display.start(forwards(network, number), number)
            return batchnorm.check(
                network, batches=loader, max_batches=self.batches, progress=display.forward, **given
            )

    def _model(self) -> "nn.Module":
        from batchnorm.cli._factory import load_model
        from batchnorm.cli._weights import load_weights, place

        with users_code():
            network = load_model(self.model, "MODEL")()
        if self.weights is not None:
            load_weights(network, self.weights)
        return place(network, self.device)

    def _optimizer(self, network: "nn.Module") -> Any:
        from batchnorm.cli._factory import load_optimizer

        if self.optimizer is None:
            return None
        with users_code():
            return load_optimizer(self.optimizer, "--optimizer")(network)

    def _averaged(self, network: "nn.Module") -> Any:
        from batchnorm.cli._weights import load_weights

        if self.averaged is None:
            return None
        average = copy.deepcopy(network)
        load_weights(average, self.averaged, "--averaged")
        return average


def _as_spec(source: str) -> str:
    module, dot, name = source.rpartition(".")
    return f"{module}:{name}" if dot and name.isidentifier() else "my_nets:make_net"


def _training(loader: Any, spec: str) -> Any:
    """Of a training and a test loader, as `batchnorm compare` takes them, the first."""
    from torch.utils.data import DataLoader

    if isinstance(loader, tuple | list) and loader and all(isinstance(each, DataLoader) for each in loader):
        stderr().print(f"note: {spec} gives {len(loader)} loaders: the first is used", markup=False)
        return loader[0]
    return loader


def _length(loader: Any, otherwise: int) -> int:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):  # an iterator, or data without a length
        return otherwise
