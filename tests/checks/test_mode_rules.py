"""BN009, BN010, BN011: modes, frozen weights, no statistics."""

import pytest
import torch
from rule_helpers import found, only, plain, trained
from torch import nn

import batchnorm


class TwoParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = plain(nn.BatchNorm2d(4), batchnorm.BatchNorm2d(4))
        self.head = plain(nn.BatchNorm2d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))


@pytest.fixture
def model() -> TwoParts:
    return trained(TwoParts())


@pytest.mark.parametrize("mode", [True, False])
def test_one_mode_throughout_is_no_finding(model: TwoParts, mode: bool) -> None:
    for code in ("BN009", "BN010", "BN011"):
        assert found(model.train(mode), code) == ()


# BN009


def test_a_part_in_eval_mode_is_named_with_its_code(model: TwoParts) -> None:
    model.train().backbone.eval()
    finding = only(model, "BN009")
    assert (finding.severity, finding.module, finding.also) == ("warning", "backbone.1", ("backbone.4",))
    assert "2 of 3 batch norms are in eval mode" in finding.message
    assert "all of backbone" in finding.message
    assert "batchnorm.freeze(model.backbone, inplace=True)" in finding.fix
    batchnorm.freeze(model.backbone, inplace=True)  # what it says
    assert found(model.train(), "BN009") == ()


def test_single_layers_in_eval_mode(model: TwoParts) -> None:
    model.train().backbone[4].eval()
    finding = only(model, "BN009")
    assert (finding.severity, finding.module) == ("warning", "backbone.4")
    assert finding.message.endswith(": backbone.4")
    assert 'model.get_submodule("backbone.4")' in finding.fix
    assert found(model.train(), "BN009") == ()


def test_training_layers_in_an_eval_model_are_an_error(model: TwoParts) -> None:
    model.eval().head[1].train()
    finding = only(model, "BN009")
    assert (finding.severity, finding.module) == ("error", "head.1")
    assert "all of head" not in finding.message or "head.1" in finding.module
    x = torch.randn(4, 4, 5, 5)
    assert not torch.allclose(model(x)[:2], model(x[:2]))  # and so it is
    assert found(model.eval(), "BN009") == ()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    assert only(model, "BN009").severity == "error"


def test_layers_without_statistics_have_no_modes(model: TwoParts) -> None:
    model.head[1] = nn.BatchNorm2d(4, track_running_stats=False)
    model.train().head.eval()
    assert found(model, "BN009") == ()


def test_all_layers_in_eval_mode_is_no_mixture(model: TwoParts) -> None:
    model.train().backbone.eval()
    model.head.eval()
    assert found(model, "BN009") == ()


# BN010


def test_frozen_weights_with_live_statistics(model: TwoParts) -> None:
    model.backbone.requires_grad_(False)
    finding = only(model, "BN010")
    assert (finding.severity, finding.module, finding.also) == ("warning", "backbone.1", ("backbone.4",))
    assert "2 batch norms of 3" in finding.message
    assert finding.fix == "batchnorm.freeze(model.backbone, inplace=True)"
    before = model.backbone[1].running_mean.clone()
    model(torch.randn(4, 4, 5, 5))
    assert not torch.equal(before, model.backbone[1].running_mean)  # and so it is
    assert only(model.eval(), "BN010").severity == "info"
    batchnorm.freeze(model.backbone, inplace=True)
    assert found(model.train(), "BN010") == ()


def test_a_whole_frozen_model(model: TwoParts) -> None:
    model.requires_grad_(False)
    assert found(model.eval(), "BN010") == ()  # plain inference
    finding = only(model.train(), "BN010")
    assert (finding.severity, finding.fix) == ("warning", "batchnorm.freeze(model, inplace=True)")


def test_near_misses_of_frozen_weights(model: TwoParts) -> None:
    model.requires_grad_(False)
    for norm in (model.backbone[1], model.backbone[4], model.head[1]):
        norm.bias.requires_grad_(True)
    assert found(model, "BN010") == ()  # β learns
    model.requires_grad_(False)
    for norm in (model.backbone[1], model.backbone[4], model.head[1]):
        norm.momentum = 0.0
    assert found(model, "BN010") == ()  # nothing moves
    bare = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)).requires_grad_(False)
    assert found(bare, "BN010") == ()


# BN011


def test_no_running_statistics() -> None:
    model = plain(nn.BatchNorm2d(4, track_running_stats=False), batchnorm.BatchNorm2d(4))
    finding = only(model, "BN011")
    assert (finding.severity, finding.module) == ("warning", "1")
    x = torch.randn(4, 4, 5, 5)
    model.eval()
    assert not torch.allclose(model(x)[:2], model(x[:2]))
    taken = torch.func.replace_all_batch_norm_modules_(plain(nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    assert only(taken, "BN011").also == ("4",)


def test_statistics_that_are_there_are_used_whatever_the_flag_says() -> None:
    model = trained(plain(nn.BatchNorm2d(4))).eval()
    model[1].track_running_stats = False
    assert found(model, "BN011") == ()
    x = torch.randn(4, 4, 5, 5)
    torch.testing.assert_close(model(x)[:2], model(x[:2]))
