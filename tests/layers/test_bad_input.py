"""Bad input: one line that says what came and what was expected, of a class that code written for PyTorch catches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm
from batchnorm import BatchNorm1d, BatchNorm2d, batch_norm

X = torch.randn(4, 3)
ONES, FOURS = torch.ones(3), torch.ones(4)


def refused(call: Callable[[], object], *kinds: type[BaseException]) -> str:
    """The message of a call that must fail, after the checks that hold for every message."""
    with pytest.raises(batchnorm.BatchNormError) as caught:
        call()
    error, text = caught.value, str(caught.value)
    for kind in kinds:
        assert isinstance(error, kind), (type(error), kind)
    assert "\n" not in text
    assert "got" in text.lower()
    assert "expected" in text.lower()
    assert text[-1].isalnum() or text[-1] in ".)]'\"", text
    return text


def torchs_error(call: Callable[[], object]) -> type[BaseException]:
    try:
        call()
    except Exception as error:
        return type(error)
    raise AssertionError("torch takes this call")


LAYER_CALLS: dict[str, tuple[str, int, Callable[[], Tensor], bool]] = {
    "1d of rank 4": ("BatchNorm1d", 3, lambda: torch.randn(2, 3, 4, 4), True),
    "1d of rank 1": ("BatchNorm1d", 3, lambda: torch.randn(3), True),
    "2d of rank 3": ("BatchNorm2d", 3, lambda: torch.randn(2, 3, 4), True),
    "2d of rank 3 in eval": ("BatchNorm2d", 3, lambda: torch.randn(2, 3, 4), False),
    "3d of rank 4": ("BatchNorm3d", 3, lambda: torch.randn(2, 3, 4, 4), True),
    "channels": ("BatchNorm1d", 3, lambda: torch.randn(5, 4), True),
    "channels in eval": ("BatchNorm1d", 3, lambda: torch.randn(5, 4), False),
    "channels last by mistake": ("BatchNorm2d", 3, lambda: torch.randn(5, 8, 8, 3), True),
    "integers": ("BatchNorm1d", 3, lambda: torch.ones(5, 3, dtype=torch.int32), True),
    "booleans in eval": ("BatchNorm1d", 3, lambda: torch.ones(5, 3, dtype=torch.bool), False),
    "complex numbers": ("BatchNorm1d", 3, lambda: torch.ones(5, 3, dtype=torch.complex64), True),
    "one value a channel": ("BatchNorm1d", 3, lambda: torch.randn(1, 3), True),
    "one value a channel, 2d": ("BatchNorm2d", 3, lambda: torch.randn(1, 3, 1, 1), True),
    "another device": ("BatchNorm1d", 3, lambda: torch.empty(5, 3, device="meta"), True),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("case", LAYER_CALLS)
def test_layers_raise_what_torchs_raise(case: str, backend: str | None) -> None:
    name, channels, make, training = LAYER_CALLS[case]
    layer = getattr(batchnorm, name)(channels, backend=backend).train(training)
    torchs = getattr(nn, name)(channels).train(training)
    x = make()
    before = {key: value.clone() for key, value in layer.state_dict().items() if "tracked" not in key}
    kinds = [] if case == "another device" else [torchs_error(lambda: torchs(x))]
    refused(lambda: layer(x), *kinds)
    for key, value in before.items():
        assert torch.equal(layer.state_dict()[key], value)


@pytest.mark.parametrize(
    "name",
    ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d"],
)
def test_wrong_rank_names_both(name: str) -> None:
    layer = getattr(batchnorm, name)(*([] if "Lazy" in name else [3]))
    text = refused(lambda: layer(torch.randn(2, 3, 1, 1, 1, 1)), ValueError)
    assert "6D" in text
    assert {"1": "2D or 3D", "2": "4D", "3": "5D"}[name[-2]] in text


FUNCTION_CALLS: dict[str, tuple[Any, ...]] = {
    "eval without statistics": (X, None, None),
    "eval without variance": (X, ONES, None),
    "mean without variance": (X, ONES, None, None, None, True),
    "variance without mean": (X, None, ONES, None, None, True),
    "statistics of four channels": (X, FOURS, FOURS),
    "variance of four channels": (X, ONES, FOURS),
    "weight of four channels": (X, None, None, FOURS, None, True),
    "weight of two axes": (X, None, None, torch.ones(2, 3), None, True),
    "bias of four channels": (X, None, None, None, FOURS, True),
    "eps of 0": (X, None, None, None, None, True, 0.1, 0.0),
    "negative eps": (X, None, None, None, None, True, 0.1, -1.0),
    "one value a channel": (X[:1], None, None, None, None, True),
    "integers": (torch.ones(4, 3, dtype=torch.int64), None, None, None, None, True),
    "complex numbers": (torch.ones(4, 3, dtype=torch.complex64), ONES, ONES),
}


@pytest.mark.parametrize("case", FUNCTION_CALLS)
def test_function_raises_what_torchs_raises(case: str) -> None:
    arguments = FUNCTION_CALLS[case]
    kind = torchs_error(lambda: F.batch_norm(*arguments))
    for backend in (None, "reference"):
        refused(lambda backend=backend: batch_norm(*arguments, backend=backend), kind)


@pytest.mark.parametrize("which", ["running_mean", "weight", "bias", "residual", "mask"])
def test_other_device_is_named(which: str) -> None:
    values = {"running_mean": ONES, "running_var": ONES, "weight": ONES, "bias": ONES, "residual": X}
    values["mask"] = torch.ones(4)
    values[which] = values[which].to("meta")
    text = refused(lambda: batch_norm(X, **values), RuntimeError)
    for part in (which, "meta", "cpu"):
        assert part in text


@pytest.mark.parametrize("name", ["relo", "RELU", "", "tanh"])
def test_unknown_activation_lists_the_known_ones(name: str) -> None:
    for call in (
        lambda: batch_norm(X, None, None, training=True, activation=name),
        lambda: BatchNorm1d(3, activation=name),
        lambda: batchnorm.LazyBatchNorm2d(activation=name),
        lambda: batchnorm.explain_backend(X, activation=name),
    ):
        text = refused(call, ValueError)
        for known in ("relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu"):
            assert known in text


def test_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(batchnorm.BatchNormError, match="reference") as error:
        batch_norm(X, None, None, training=True, backend="cuda-please")
    assert "\n" not in str(error.value)
    assert "cuda-please" in str(error.value)
    assert "aten" in str(error.value)


def test_unknown_nonfinite_policy() -> None:
    text = refused(lambda: BatchNorm2d(3, nonfinite="ignore"), ValueError)
    assert "skip" in text
    assert "propagate" in text


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "residual",
    [torch.randn(4, 3, 1), torch.randn(3), torch.randn(4, 3, 6), torch.randn(2, 3, 5), torch.randn(1, 3, 5)],
    ids=lambda r: str(tuple(r.shape)),
)
def test_residual_of_another_shape(residual: Tensor, training: bool) -> None:
    x = torch.randn(4, 3, 5)
    text = refused(lambda: batch_norm(x, ONES, ONES, training=training, residual=residual), ValueError)
    assert "residual" in text
    assert str(tuple(residual.shape)) in text
    assert "(4, 3, 5)" in text
    layer = BatchNorm1d(3).train(training)
    refused(lambda: layer(x, residual), ValueError)
    assert layer.num_batches_tracked.item() == 0


def test_residual_of_integers() -> None:
    text = refused(lambda: batch_norm(X, None, None, training=True, residual=X.long()), TypeError)
    assert "residual" in text


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(4, 3, 5), (3, 5), (4, 4), (2, 4, 5), (0,)], ids=str)
def test_mask_that_cannot_broadcast(shape: tuple[int, ...], training: bool) -> None:
    x = torch.randn(4, 3, 5)
    text = refused(lambda: batch_norm(x, ONES, ONES, training=training, mask=torch.ones(shape)), ValueError)
    assert "mask" in text
    assert str(shape) in text
    assert "(4, 5)" in text


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_negative_mask(training: bool) -> None:
    layer = BatchNorm1d(3).train(training)
    text = refused(lambda: layer(X, mask=torch.tensor([1.0, 2.0, -0.5, 1.0])), ValueError)
    assert "mask" in text
    assert "-0.5" in text
    assert layer.running_mean.tolist() == [0, 0, 0]
    assert layer.num_batches_tracked.item() == 0


def test_mask_of_complex_numbers() -> None:
    refused(
        lambda: batch_norm(X, None, None, training=True, mask=torch.ones(4, dtype=torch.complex64)), TypeError
    )


def test_mask_of_nan() -> None:
    text = refused(
        lambda: batch_norm(X, None, None, training=True, mask=torch.tensor([1, float("nan"), 1, 1])),
        ValueError,
    )
    assert "mask" in text


@pytest.mark.parametrize("value", [None, [1.0, 2.0], 3.0, "x"], ids=str)
def test_input_that_is_no_tensor(value: Any) -> None:
    refused(lambda: batch_norm(value, None, None, training=True), TypeError)
    refused(lambda: BatchNorm1d(3)(value), TypeError)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_parameters_of_another_dtype_raise_what_torchs_raise(training: bool) -> None:
    kind = torchs_error(lambda: nn.BatchNorm1d(3).train(training)(X.double()))
    with pytest.raises(kind) as error:
        BatchNorm1d(3).train(training)(X.double())
    assert "dtype" in str(error.value)
    assert "\n" not in str(error.value)


def test_explicit_backend_that_cannot_run_the_call() -> None:
    with pytest.raises(batchnorm.BackendError) as error:
        batch_norm(X, None, None, training=True, mask=torch.ones(4), backend="aten")
    assert "\n" not in str(error.value)
    assert "mask" in str(error.value)
    assert "aten" in str(error.value)
