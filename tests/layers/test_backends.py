"""explain_backend says what runs, and why each other does not."""

import itertools

import pytest
import torch
from helpers import ACTIVATIONS, same_bits

import batchnorm

X = torch.randn(8, 3, 4)
FEATURES = list(itertools.product([True, False], [None, "relu"], [False, True], [False, True]))


@pytest.mark.parametrize(("training", "activation", "residual", "masked"), FEATURES, ids=str)
def test_the_chosen_backend_is_the_one_that_runs(
    training: bool, activation: str | None, residual: bool, masked: bool
) -> None:
    mask = torch.rand(8, 4) < 0.7 if masked else None
    r = torch.randn_like(X) if residual else None
    choice = batchnorm.explain_backend(X, training=training, activation=activation, residual=r, mask=mask)
    assert choice == batchnorm.explain_backend(
        X, training=training, activation=activation, residual=residual, mask=masked
    )
    assert not {candidate.refused for candidate in choice.candidates if candidate.name == choice.chosen} - {
        None,
        "",
    }
    arguments = {"training": training, "activation": activation, "residual": r, "mask": mask}
    stats = (torch.zeros(3), torch.ones(3))
    y = batchnorm.batch_norm(X, *[value.clone() for value in stats], **arguments)
    assert same_bits(
        y, batchnorm.batch_norm(X, *[value.clone() for value in stats], **arguments, backend=choice.chosen)
    )
    for candidate in choice.candidates:
        if candidate.refused:
            with pytest.raises(batchnorm.BackendError):
                batchnorm.batch_norm(
                    X, *[value.clone() for value in stats], **arguments, backend=candidate.name
                )
            assert candidate.refused in str(choice)


def test_text_names_every_backend_and_the_known_error() -> None:
    text = str(batchnorm.explain_backend(X))
    for word in ("aten", "reference", "chosen", "exact"):
        assert word in text


def test_atens_known_error_depends_on_the_layout() -> None:
    planes = torch.randn(4, 3, 5, 5)
    rows = planes.contiguous(memory_format=torch.channels_last)
    texts = [str(batchnorm.explain_backend(x)) for x in (planes, rows)]
    assert texts[0] != texts[1]
    assert "10⁷" in texts[1]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_reference_runs_everything(device: str, activation: str | None) -> None:
    x = torch.empty(8, 3, 4, device=device)
    choice = batchnorm.explain_backend(x, activation=activation, residual=True, mask=True)
    assert not next(candidate for candidate in choice.candidates if candidate.name == "reference").refused


def test_layer_with_a_backend_uses_it() -> None:
    x = torch.full((1000, 1), 100.1)
    plain, exact = batchnorm.BatchNorm1d(1, backend="aten"), batchnorm.BatchNorm1d(1, backend="reference")
    assert plain(x).abs().max() > 0
    assert exact(x).abs().max() == 0
