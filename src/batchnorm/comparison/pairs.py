"""A network with batch norm and the same network without, sharing the weights that both have."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm._errors import BatchNormError, InputTypeError, ModelError, message
from batchnorm.comparison.record import seeded

if TYPE_CHECKING:
    from batchnorm._walk import Skipped

__all__ = ["Pair", "make_pair"]


@dataclass(frozen=True, eq=False)
class Pair:
    """The two networks of one seed. `how` says which of them was derived: batch norm inserted, or removed."""

    plain: nn.Module
    normalized: nn.Module
    how: Literal["insert", "remove"]
    changed: int
    skipped: int
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> tuple[int, int]:
        """How many parameters each network has: without, with batch norm."""
        plain, normalized = (
            sum(p.numel() for p in net.parameters()) for net in (self.plain, self.normalized)
        )
        return plain, normalized


def make_pair(
    factory: Callable[[], nn.Module], sample: Tensor, labels: int, seed: int, device: torch.device
) -> Pair:
    """Build the model under the seed and derive its partner.

    Args:
        factory: returns a new model; one with batch norm is compared with the same model without it, one without
            with the same model with it.
        sample: a few inputs, (n, *features), for lazy layers and to check the output.
        labels: the number of classes in the data.
        seed: seeds the weights.
        device: where both networks go.

    Raises:
        ModelError: the factory fails or returns no module, the output is not (n, classes), or there is no place for
            batch norm in the model.
    """
    with seeded(seed, device):
        built = _built(factory)
        if any(map(is_lazy, [*built.parameters(), *built.buffers()])):
            # PyTorch cannot copy a lazy layer before its first batch.
            _scores(built, sample.cpu())
        model = copy.deepcopy(built).to(device)
        check_output(model, sample.to(device), labels)
        return _derived(model)


def check_output(model: nn.Module, sample: Tensor, labels: int) -> None:
    """Refuse a model whose output for `sample` is not one score a class, or that has nothing to train."""
    output = _scores(model, sample)
    shape = tuple(output.shape) if isinstance(output, Tensor) else None
    if shape is None or len(shape) != 2 or shape[0] != len(sample) or shape[1] < labels:
        raise ModelError(
            message(
                "the model's output",
                got=f"a {type(output).__name__}" if shape is None else f"shape {shape}",
                expected=f"shape ({len(sample)}, classes) for {len(sample)} samples and at least {labels} classes",
                fix="End the model with a linear layer of one output a class.",
            )
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(message("the model", got="no trainable parameter", expected="something to train"))


def forward(model: nn.Module, x: Tensor) -> Any:
    """The model's output, or one line that says why it cannot take this input."""
    try:
        return model(x)
    except BatchNormError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            message(
                "the model",
                got=f"an error on a batch of shape {tuple(x.shape)}, {x.dtype} ({reason[:300]})",
                expected="a model that takes such a batch",
                fix="Check that model and data fit each other.",
            )
        ) from error


def _scores(model: nn.Module, sample: Tensor) -> Any:
    model.eval()
    with torch.no_grad():
        output = forward(model, sample)
    model.train()
    return output


def _built(factory: Callable[[], nn.Module]) -> nn.Module:
    if isinstance(factory, nn.Module) or not callable(factory):
        raise InputTypeError(
            message(
                "make_model",
                got=f"a {type(factory).__name__}",
                expected="the name of a network or a function that builds a new model",
                fix="Wrap it: lambda: MyModel().",
            )
        )
    try:
        model = factory()
    except BatchNormError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            message("make_model()", got=f"{type(error).__name__} ({reason[:300]})", expected="a new model")
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            message("make_model()", got=f"a {type(model).__name__}", expected="a torch.nn.Module")
        )
    return model


def _derived(model: nn.Module) -> Pair:
    # Imported at use: surgery is only needed once there is a model to change.
    from batchnorm.surgery import insert, remove

    has_norm = any(isinstance(module, _BatchNorm) for module in model.modules())
    changes = remove(model) if has_norm else insert(model)
    if not changes.changed:
        raise ModelError(
            message(
                "the model",
                got="no batch norm that could be removed" if has_norm else "no place for batch norm",
                expected="a model with batch norm, or with hidden activations that it can be put before",
                fix=_reasons(changes.skipped),
            )
        )
    counts = len(changes.changed), len(changes.skipped)
    if has_norm:
        return Pair(changes.model, model, "remove", *counts, changes.notes)
    return Pair(model, changes.model, "insert", *counts, changes.notes)


def _reasons(skipped: Sequence["Skipped"]) -> str:
    texts = [f"{skip.name or 'the model'}: {skip.reason}" for skip in skipped]
    more = f"; and {len(texts) - 3} more" if len(texts) > 3 else ""
    return f"Skipped: {'; '.join(texts[:3])}{more}" if texts else ""
