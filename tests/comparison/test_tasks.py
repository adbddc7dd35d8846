"""Regression: its targets, its score, and a whole comparison of numbers; and what the two tasks say of themselves."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score
from torch import Tensor, nn

import batchnorm
from batchnorm._errors import BatchNormError, DataError, InputError, ModelError
from batchnorm.comparison.claims import headline
from batchnorm.comparison.data import Data
from batchnorm.comparison.figures import learning_rates, score_curves
from batchnorm.comparison.tasks import task_named
from batchnorm.comparison.wording import words

Arrays = tuple[Tensor, Tensor, Tensor, Tensor]
LEARN = task_named("regression")


def noisy_sine(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, generator=generator)
    y = 40 + 7 * (x[:, 0].sin() + 0.5 * x[:, 1] * x[:, 2]) + 0.5 * torch.randn(samples, generator=generator)
    return x, y


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    return (*noisy_sine(256, 0), *noisy_sine(128, 1))


def net(outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, outputs))


@pytest.mark.parametrize("outputs", [1, 3])
def test_r2_is_that_of_scikit_learn(outputs: int) -> None:
    generator = torch.Generator().manual_seed(outputs)
    y = torch.randn(50, outputs, generator=generator, dtype=torch.float64) * 3 + 100
    predicted = y + 0.7 * torch.randn(50, outputs, generator=generator, dtype=torch.float64)
    found = LEARN.score([(predicted[:20], y[:20]), (predicted[20:], y[20:])])
    assert found == pytest.approx(r2_score(y.numpy(), predicted.numpy()), abs=1e-12)
    assert 0.5 < found < 1


def test_worse_than_the_mean_and_not_a_number_count_as_0() -> None:
    y = torch.tensor([[1.0], [2.0], [3.0]])
    assert LEARN.score([(y.flip(0) * 10, y)]) == 0.0
    assert LEARN.score([(torch.tensor([[1.0], [math.nan], [3.0]]), y)]) == 0.0
    assert LEARN.score([(torch.tensor([[1.0], [math.inf], [3.0]]), y)]) == 0.0
    assert LEARN.score([(y, y)]) == 1.0


def test_clearly_above_guessing_is_what_unrelated_predictions_stay_below() -> None:
    rng = np.random.default_rng(0)
    samples = 80
    squares = [np.corrcoef(rng.normal(size=(2, samples)))[0, 1] ** 2 for _ in range(4000)]
    assert 0.93 < np.mean(np.array(squares) < LEARN.clear(0.0, samples)) < 0.97


@pytest.mark.parametrize("shape", [(256,), (256, 1), (256, 2)])
def test_targets_are_scaled_by_the_training_targets(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    y = 1e6 + 5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    x = torch.randn(256, 3, generator=generator)
    data = Data(x, y, x[:100], y[:100] + 5, task="regression")
    assert data.y_train.dtype == torch.float32
    assert data.outputs == (shape[1] if len(shape) == 2 else 1)
    torch.testing.assert_close(
        data.y_train.double().mean(0), torch.zeros(data.outputs).double(), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(data.y_train.double().std(0), torch.ones(data.outputs).double())
    expected = (y[:100] + 5 - y.mean(0)) / y.std(0)
    torch.testing.assert_close(data.y_test.double(), expected.reshape(100, -1), atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def result(arrays: Arrays) -> batchnorm.Comparison:
    return batchnorm.compare(
        net, arrays, task="regression", lrs=[0.03, 0.3], seeds=2, steps=150, batch_size=32
    )


def test_a_regression_is_compared(result: batchnorm.Comparison) -> None:
    summary = result.summary
    assert (result.setup.task, summary.task, summary.chance) == ("regression", "regression", 0.0)
    assert 0.5 < min(summary.plain.best) <= 1
    assert 0.5 < min(summary.normalized.best) <= 1
    # A prediction of the mean has the loss 1, because the targets are scaled.
    assert all(run.loss[1] < 1.5 and run.loss[-1] < 0.5 for run in result.runs if run.lr == 0.03)


def test_every_word_of_the_report_speaks_of_r2(result: batchnorm.Comparison) -> None:
    page = result._repr_html_()
    text = " ".join([str(result), *result.notes, headline(result.summary, "net", "data")])
    for found in (page, text):
        assert "accurac" not in found.lower()
        assert "guessing" not in found
        assert "points" not in found.replace("datapoints", "")
        assert "cross entropy" not in found
        assert "R²" in found
    assert "mean squared error" in text
    figures = score_curves(result.summary, result.runs), learning_rates(result.summary)
    assert [figure.layout["yaxis"]["tickformat"] for figure in figures] == [".2f", ".2f"]
    assert figures[0].title == "Test R² against training steps"


def test_words_of_both_tasks() -> None:
    accuracy, r2 = words("classification"), words("regression")
    assert (accuracy.score(0.93556), r2.score(0.93556)) == ("93.6 %", "0.936")
    assert (accuracy.difference(-0.0213), r2.difference(-0.0213)) == ("−2.1 points", "−0.021")
    assert (accuracy.size(-0.0213), r2.size(-0.0213)) == ("2.1 points", "0.021")


def test_a_model_may_give_one_number_without_its_own_axis(arrays: Arrays) -> None:
    def squeezed() -> nn.Module:
        return nn.Sequential(*net(), nn.Flatten(0))

    options: dict[str, Any] = {"task": "regression", "lrs": [0.1], "seeds": 1, "steps": 20, "batch_size": 32}
    first, second = (batchnorm.compare(make, arrays, **options) for make in (net, squeezed))
    assert [run.loss[1:] for run in first.runs] == [run.loss[1:] for run in second.runs]


def test_loaders_give_numbers_too(arrays: Arrays) -> None:
    train = list(zip(arrays[0].split(32), ((arrays[1] - 40) / 7).split(32), strict=True))
    test = list(zip(arrays[2].split(50), ((arrays[3] - 40) / 7).double().split(50), strict=True))
    found = batchnorm.compare(net, (train, test), task="regression", lrs=[0.1], seeds=1, steps=100)
    assert min(found.summary.plain.best) > 0.5


def test_targets_of_loaders_that_are_far_from_unit_scale_are_told(arrays: Arrays) -> None:
    train = list(zip(arrays[0].split(32), (arrays[1] * 1e4).split(32), strict=True))
    options: dict[str, Any] = {"task": "regression", "lrs": [1e-9], "seeds": 1, "steps": 4, "dynamics": False}
    found = batchnorm.compare(net, (train, train), **options)
    assert any("Caution: the targets of the training loader have mean" in note for note in found.notes)
    scaled = list(zip(arrays[0].split(32), ((arrays[1] - 40) / 7).split(32), strict=True))
    assert not any(
        "targets of the" in note for note in batchnorm.compare(net, (scaled, scaled), **options).notes
    )


X, Y = noisy_sine(20, 2)


@pytest.mark.parametrize(
    ("error", "expected", "data", "make", "task"),
    [
        (DataError, 'y_train: got numbers such as', (X, Y, X, Y), net, None),
        (DataError, 'task="regression"', (X, Y, X, Y), net, "classification"),
        (DataError, "the same number 3 for every sample", (X, Y * 0 + 3, X, Y), net, "regression"),
        (DataError, "y_test: got the same number", (X, Y, X, Y * 0), net, "regression"),
        (DataError, "y_train: got 1 NaN", (X, torch.where(Y[3] == Y, math.nan, Y), X, Y), net, "regression"),
        (DataError, "shape (20, 1, 1), expected real numbers", (X, Y[:, None, None], X, Y), net, "regression"),
        (DataError, "y_test: got 2 numbers a sample, expected 1", (X, Y, X, torch.stack([Y, Y], 1)), net, "regression"),
        (ModelError, "shape (2, 3), expected shape (2, 1) for 2 samples", (X, Y, X, Y), lambda: net(3), "regression"),
        (InputError, "expected classification, which the data digits are for", "digits", "mlp", "regression"),
    ],
)  # fmt: skip
def test_bad_input(
    error: type[BatchNormError], expected: str, data: Any, make: Any, task: str | None
) -> None:
    with pytest.raises(error) as caught:
        batchnorm.compare(make, data, task=task, lrs=[0.1], seeds=1, steps=1, batch_size=5)
    assert expected in str(caught.value)
