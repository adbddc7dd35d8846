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
from batchnorm.comparison.tasks import Task

if TYPE_CHECKING:
    from batchnorm._walk import Skipped

__all__ = ["Pair", "copied", "given", "make_pair", "raised", "scores"]


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
    factory: Callable[[], nn.Module],
    sample: Tensor,
    task: Task,
    outputs: int,
    seed: int,
    device: torch.device,
    *,
    lowest: int = 0,
) -> Pair:
    """Build the model under the seed and derive its partner.

    Args:
        factory: returns a new model; one with batch norm is compared with the same model without it, one without
            with the same model with it.
        sample: a few inputs, (n, *features), for lazy layers and to check the output.
        task: what is learned.
        outputs: how many outputs that needs: the largest label plus one, or the numbers a sample.
        seed: seeds the weights.
        device: where both networks go.
        lowest: the smallest label.

    Raises:
        ModelError: the factory fails or returns no module, the model cannot be copied, the output does not
            suit the task, or there is no place for batch norm in the model.
    """
    with seeded(seed, device):
        built = _built(factory)
        if any(map(is_lazy, [*built.parameters(), *built.buffers()])):
            # PyTorch cannot copy a lazy layer before its first batch.
            _evaluated(built, sample.cpu())
        model = copied(built).to(device)
        check_output(model, sample.to(device), task, outputs, lowest)
        return _derived(model)


def check_output(model: nn.Module, sample: Tensor, task: Task, outputs: int, lowest: int = 0) -> None:
    """Refuse a model whose output for `sample` does not suit the task, or that has nothing to train."""
    output = _evaluated(model, sample)
    if task.fit(output, sample, outputs) is None:
        fix = f"End the model with a linear layer of one output a {task.unit}."
        if lowest > 0 and task.fit(output, sample, outputs - lowest) is not None:
            fix = (
                f"The labels run from {lowest} to {outputs - 1}, and classes count from 0: "
                f"subtract {lowest} from the labels."
            )
        raise _wrong_output(output, task.expected(sample, outputs), fix)
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(message("the model", got="no trainable parameter", expected="something to train"))


def scores(model: nn.Module, x: Tensor, y: Tensor, task: Task) -> Tensor:
    """The model's output for `x`, (N, classes) or (N, outputs), in the mode that it is in.

    Raises:
        ModelError: the model fails, or its output is something else.
    """
    output = _forward(model, x)
    fitted = task.fit(output, x, task.width(y))
    if fitted is None:
        mode = "train" if model.training else "eval"
        fix = f"This is its output in {mode} mode; it must give that alone in both modes."
        raise _wrong_output(output, task.expected(x, None), fix)
    return fitted


def given(model: nn.Module, x: Tensor) -> Tensor:
    """A copy of `x`, which the model may change in place, in the dtype of the model's parameters."""
    if x.is_floating_point():
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype)
        return x.to(dtype, copy=True)
    return x.clone()


def copied(model: nn.Module) -> nn.Module:
    """A deep copy.

    Raises:
        ModelError: the model cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ModelError(
            message(
                "the model",
                got=f"an error on copying it ({raised(error)})",
                expected="a model that copy.deepcopy copies",
                fix="Tensors that it computed must not be kept in attributes; instead of the old weight_norm and "
                "spectral_norm use those of torch.nn.utils.parametrizations.",
            )
        ) from error


def raised(error: BaseException) -> str:
    """An exception of the user's code in one line of bounded length."""
    reason = " ".join(str(error).split())
    return f"{type(error).__name__}: {reason[:300]}" if reason else type(error).__name__


def _forward(model: nn.Module, x: Tensor) -> Any:
    try:
        return model(given(model, x))
    except BatchNormError:
        raise
    except Exception as error:
        fix = "Check that model and data fit each other."
        if x.dim() > 2 and "shapes cannot be multiplied" in str(error):
            fix = "A linear layer takes samples in one row: begin the model with nn.Flatten()."
        raise ModelError(
            message(
                "the model",
                got=f"an error on a batch of shape {tuple(x.shape)}, {x.dtype} ({raised(error)})",
                expected="a model that takes such a batch",
                fix=fix,
            )
        ) from error


def _wrong_output(output: object, expected: str, fix: str) -> ModelError:
    got = f"a {type(output).__name__}"
    if isinstance(output, Tensor):
        got = f"shape {tuple(output.shape)}" + ("" if output.is_floating_point() else f", {output.dtype}")
    return ModelError(message("the model's output", got=got, expected=expected, fix=fix))


def _evaluated(model: nn.Module, sample: Tensor) -> Any:
    model.eval()
    with torch.no_grad():
        output = _forward(model, sample)
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
    except (Exception, SystemExit) as error:  # a script may end itself
        raise ModelError(message("make_model()", got=raised(error), expected="a new model")) from error
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
