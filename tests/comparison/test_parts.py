"""Batches, networks and the measurement of accuracy, each on its own."""

import pytest
import torch
from torch import Tensor, nn

from batchnorm.comparison.data import Data
from batchnorm.comparison.networks import network
from batchnorm.comparison.record import draw_batches
from batchnorm.comparison.tasks import task_named
from batchnorm.comparison.training import score_on


def test_incomplete_batches_are_left_out() -> None:
    x = torch.arange(11.0)[:, None]
    y = torch.arange(11) % 2
    drawn = draw_batches(Data(x, y, x, y), batch_size=5, steps=5, seed=3, device=torch.device("cpu"))
    batches = [part.flatten().tolist() for part, _ in drawn]
    assert [len(batch) for batch in batches] == [5] * 5
    assert drawn.epoch == 2
    assert len({*batches[0], *batches[1]}) == 10
    assert [part.flatten().tolist() for part, _ in drawn] == batches


def test_initialization_suits_the_activation() -> None:
    build = network("deep-mlp").build
    linear = [module for module in build((64,), 10).modules() if isinstance(module, nn.Linear)]
    # He: variance 2/fan_in before ReLU; Xavier: 2/(fan_in + fan_out) at the output
    assert float(
        torch.stack([layer.weight.detach().var() for layer in linear[1:10]]).mean()
    ) == pytest.approx(0.02, rel=0.03)
    assert float(linear[10].weight.detach().var()) == pytest.approx(2 / 110, rel=0.15)
    assert all(not layer.bias.any() for layer in linear)


class Scores(nn.Module):
    """Right in eval mode, wrong in train mode; NaN for negative inputs."""

    def forward(self, x: Tensor) -> Tensor:
        right = torch.tensor([0.0, 1.0]).expand(len(x), 2)
        scores = right.flip(1) if self.training else right
        return torch.where(x < 0, torch.nan, scores)


@pytest.mark.parametrize("training", [True, False])
def test_accuracy_is_that_of_eval_mode_and_leaves_the_mode_alone(training: bool) -> None:
    model = Scores().train(training)
    x, y = torch.ones(4, 1), torch.tensor([1, 1, 1, 0])
    assert score_on(model, [(x, y), (x[:1], y[:1])], task_named("classification")) == pytest.approx(4 / 5)
    assert model.training == training


def test_a_score_of_nan_is_wrong_even_for_the_class_that_argmax_names() -> None:
    # argmax of a row of NaN is 0
    x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
    assert score_on(Scores(), [(x, y)], task_named("classification")) == pytest.approx(0.5)
