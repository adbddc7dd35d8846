"""Weights in files, for every command that reads or writes them: state dicts of torch.save, and safetensors."""

import io
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm._errors import DataError, InputError, ModelError, message
from batchnorm._files import require, write_whole

__all__ = ["check_format", "load_weights", "place", "read_state", "save_weights"]

# Under these keys training scripts keep the state dict beside other things.
_KEYS = ("state_dict", "model_state_dict", "model")


def check_format(path: Path) -> None:
    """Find out now whether a file of this name can be made.

    Raises:
        MissingDependencyError: its format needs a package that is not installed.
    """
    if _is_safetensors(path):
        _safetensors()


def load_weights(model: nn.Module, path: Path, option: str = "--weights") -> None:
    """Load a state dict into the model, all of it or nothing; `option` is for what errors say.

    Raises:
        DataError: a file that is not there, cannot be read safely, or holds no state dict.
        ModelError: weights of another model.
        MissingDependencyError: the format needs a package that is not installed.
    """
    state = _unwrapped(_read(path, option), model.state_dict())
    wrong = _differences(model, state)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(
            message(
                f"{option} {path}",
                got="; ".join(wrong[:3]) + more,
                expected="the weights of this model",
                fix="Give the factory of the model that they were saved from.",
            )
        )
    model.load_state_dict(state)


def read_state(path: Path, option: str) -> dict[str, Any]:
    """The state dict in a checkpoint, to look at: beside tensors it may hold anything, and lie among other things.

    Raises:
        DataError: a file that is not there, cannot be read safely, or holds no state dict.
        MissingDependencyError: the format needs a package that is not installed.
    """
    loaded = _loaded(path, option, "Save model.state_dict(), or give the function that loads it.")
    state = _state_in(loaded)
    if state is None:
        raise DataError(
            message(
                f"{option} {path}",
                got=f"a {type(loaded).__name__} without tensors by name",
                expected="a state dict, by itself or in a checkpoint",
            )
        )
    return {key: value for key, value in state.items() if isinstance(key, str)}


def _state_in(loaded: Any) -> Mapping[Any, Any] | None:
    """Under one of the usual keys, as the whole, or under any key where there is a batch norm."""
    if not isinstance(loaded, Mapping):
        return None
    inner = [value for value in (loaded.get(key) for key in _KEYS) if isinstance(value, Mapping)]
    others = [value for value in loaded.values() if isinstance(value, Mapping) and _has_norms(value)]
    return next((each for each in (*inner, loaded, *others) if _has_tensors(each)), None)


def _has_tensors(state: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in state.values())


def _has_norms(state: Mapping[Any, Any]) -> bool:
    return any(str(key).endswith("running_mean") for key in state)


def _read(path: Path, option: str) -> dict[str, Tensor]:
    loaded = _loaded(path, option, "Save model.state_dict() instead of the model.")
    if isinstance(loaded, Mapping) and not _is_state(loaded):
        loaded = next((loaded[key] for key in _KEYS if isinstance(loaded.get(key), Mapping)), loaded)
    if not isinstance(loaded, Mapping) or not _is_state(loaded):
        raise DataError(
            message(
                f"{option} {path}",
                got=f"a {type(loaded).__name__}",
                expected="a state dict: names and tensors",
            )
        )
    return dict(loaded)


def _loaded(path: Path, option: str, fix: str) -> Any:
    """What a file holds, read without running code that it may hold; `fix` is for one that is not read."""
    if not path.is_file():
        got = f"{path}, a folder" if path.is_dir() else f"{path}, no such file"
        raise DataError(message(option, got=got, expected="a file with weights"))
    try:
        if _is_safetensors(path):
            return _safetensors().load(path.read_bytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a scripted model, which then is an error
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except pickle.UnpicklingError as error:
        raise DataError(
            message(
                f"{option} {path}",
                got=_foreign(path) or "a file that holds more than tensors, which could run any code",
                expected="a state dict saved by torch.save, or .safetensors",
                fix=fix,
            )
        ) from error
    except Exception as error:  # each format has its own ways to be broken
        text = " ".join(str(error).split())[:200]
        raise DataError(
            message(
                f"{option} {path}",
                got=_foreign(path) or f"{type(error).__name__} on reading it ({text})",
                expected="a state dict saved by torch.save, or .safetensors",
            )
        ) from error


def _foreign(path: Path) -> str:
    """What a file is that is none of its format by its first bytes; "" if these are right."""
    with path.open("rb") as file:
        start = file.read(2)
    if not start:
        return "an empty file"
    # torch.save writes a zip archive, and before PyTorch 1.6 a pickle of protocol 2 or later.
    known = _is_safetensors(path) or start == b"PK" or start[:1] == b"\x80"
    return "" if known else "no file of torch.save"


def _unwrapped(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that AveragedModel and DistributedDataParallel put before every name."""
    prefix = "module."
    inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    rest = [name for name in state if not name.startswith(prefix)]
    return inner if inner and rest in ([], ["n_averaged"]) and not set(inner) ^ set(own) else state


def _is_state(value: Mapping[Any, Any]) -> bool:
    return bool(value) and all(isinstance(item, Tensor) for item in value.values())


def _differences(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    own = model.state_dict()
    wrong = [f"no {name}" for name in own if name not in state]
    wrong += [f"{name}, which the model has not" for name in state if name not in own]
    wrong += [
        f"{name} of shape {tuple(state[name].shape)} for {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    return wrong


def place(model: nn.Module, device: str) -> nn.Module:
    """Move the model; "auto" takes a GPU where there is one.

    Raises:
        InputError: there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        text = " ".join(str(error).split())[:120]
        raise InputError(
            message("--device", got=f"{device} ({text})", expected="a device of this machine, such as cpu")
        ) from error


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the state dict, whole or not at all: safetensors by that suffix, else as torch.save does.

    Raises:
        OutputError: the file cannot be written.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if _is_safetensors(path):
        # Tied weights are stored once for each name: the format has no sharing.
        content = _safetensors().save({name: value.clone() for name, value in state.items()})
    else:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
    write_whole(path, content)


def _is_safetensors(path: Path) -> bool:
    return path.suffix.lower() == ".safetensors"


def _safetensors() -> Any:
    return require("safetensors.torch", package="safetensors", purpose="a file in the format safetensors")
