"""What `check` is given wrongly: an error that says what to give instead; the model is as it was."""

import pytest
import torch
from rule_helpers import plain, sick
from stats_helpers import assert_same_state, state
from torch import nn

import batchnorm


@pytest.mark.parametrize("model", ["resnet50", [nn.BatchNorm2d(4)], None, 3, nn.BatchNorm2d])
def test_what_is_no_model(model: object) -> None:
    with pytest.raises(batchnorm.InputTypeError, match=r"torch.nn.Module"):
        batchnorm.check(model)


def test_a_checkpoint_that_holds_the_state_dict() -> None:
    with pytest.raises(batchnorm.InputTypeError, match="Pass what it holds as 'model'"):
        batchnorm.check({"epoch": 3, "model": sick().state_dict()})
    with pytest.raises(batchnorm.InputTypeError, match="state_dict"):
        batchnorm.check({})


@pytest.mark.parametrize(
    "given",
    [
        {"batches": [torch.randn(2, 4, 5, 5)]},
        {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)},
        {"averaged": nn.Linear(1, 1)},
        {"forward": lambda model, batch: model(batch)},
    ],
)
def test_a_state_dict_with_what_needs_a_model(given: dict) -> None:
    with pytest.raises(batchnorm.InputError, match=next(iter(given))):
        batchnorm.check(sick().state_dict(), **given)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"averaged": {}}, batchnorm.InputTypeError),
        ({"optimizer": "sgd"}, batchnorm.InputTypeError),
        ({"batches": 3}, batchnorm.InputTypeError),
        ({"batches": []}, batchnorm.DataError),
        ({"batches": [torch.randn(2, 7)]}, batchnorm.DataError),
        ({"max_batches": 0}, batchnorm.InputError),
        ({"max_batches": True}, batchnorm.InputError),
    ],
)
def test_bad_arguments(given: dict, error: type[Exception]) -> None:
    model = sick()
    before = state(model)
    with pytest.raises(error, match=next(iter(given)).split("_")[0].removesuffix("es")):
        batchnorm.check(model, **given)
    assert_same_state(model, before)


def test_a_batch_that_begins_with_the_labels_is_told() -> None:
    batches = [(torch.zeros(8, dtype=torch.long), torch.randn(8, 3))]
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    says = (
        r"The first of 2 elements was taken as the input: int64 of shape \(8,\)\. If .* a loader that gives"
    )
    with pytest.raises(batchnorm.DataError, match=says):
        batchnorm.check(model, batches=batches)
    with pytest.raises(batchnorm.DataError) as error:
        batchnorm.check(model, batches=batches, forward=lambda model, batch: model(batch[0]))
    assert "was taken" not in str(error.value)


def test_a_function_as_batches_is_to_be_called() -> None:
    def make_loader() -> list[torch.Tensor]:
        return []

    with pytest.raises(
        batchnorm.InputTypeError, match=r"check: batches: got a function.*batches=make_loader\(\)"
    ):
        batchnorm.check(sick(), batches=make_loader)  # type: ignore[arg-type]


def test_the_optimizer_of_another_model_is_refused() -> None:
    model = sick()
    parameters = list(model.parameters())
    with pytest.raises(batchnorm.InputError, match=r"SGD that holds none of this model's .*SGD\(model\.par"):
        batchnorm.check(model, optimizer=torch.optim.SGD(sick().parameters(), 0.1, weight_decay=0.1))
    # One that holds a part of them is usual.
    assert "BN014" in batchnorm.check(model, optimizer=torch.optim.SGD(parameters[:1], 0.1)).ran


def test_a_scripted_model_is_refused() -> None:
    with pytest.warns(DeprecationWarning, match="script"):
        scripted = torch.jit.script(plain(nn.BatchNorm2d(4)))
    with pytest.raises(batchnorm.ModelError, match="scripted"):
        batchnorm.check(scripted)
