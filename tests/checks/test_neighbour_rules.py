"""BN012, BN013, BN018, BN019: what stands around a layer, and what it holds."""

import pytest
import torch
from rule_helpers import found, only, plain, trained
from torch import nn
from torch.nn import functional as F

import batchnorm

# BN012


def test_bias_before_batch_norm() -> None:
    model = trained(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    )
    x = torch.randn(3, 3, 6, 6)
    model(x)
    for mode in (True, False):
        finding = only(model.train(mode), "BN012")
        assert (finding.severity, finding.module) == ("info", "1")
        assert finding.evidence == {"before": {"1": "0"}}
    (model.train()(x) * torch.randn(3, 2)).sum().backward()
    assert model[0].bias.grad.abs().max() < 1e-4 * model[0].weight.grad.abs().max()  # and so it is
    mended = batchnorm.absorb_bias(model.eval()).model
    assert found(mended, "BN012") == ()
    torch.testing.assert_close(mended(x), model(x))


def test_several_biases_are_one_finding() -> None:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), batchnorm.BatchNorm1d(4)
    )
    finding = only(model, "BN012")
    assert (finding.also, finding.evidence["before"]) == (("4",), {"1": "0", "4": "3"})
    assert "2 batch norms" in finding.message


class Elsewhere(nn.Module):
    """A layer with a bias whose output goes to something else, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return y + self.norm(y)


def test_biases_that_do_something() -> None:
    assert found(plain(nn.BatchNorm2d(4)), "BN012") == ()  # there is none
    assert found(Elsewhere(), "BN012") == ()
    assert found(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), "BN012") == ()
    frozen = batchnorm.freeze(trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))).model
    assert found(frozen, "BN012") == ()
    # Channels of the linear layer are the last axis, those of batch norm axis 1.
    sequence = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(5))
    assert found(sequence, "BN012") == ()


# BN013


class ByFunction(nn.Module):
    def __init__(self, share: float) -> None:
        super().__init__()
        self.share, self.norm = share, nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(F.dropout(x, self.share, self.training))


@pytest.mark.parametrize(
    ("model", "share", "left"),
    [
        (nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4)), 0.5, 71),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout2d(0.2), nn.MaxPool2d(2), nn.BatchNorm2d(4)), 0.2, 89),
        (ByFunction(0.36), 0.36, 80),
    ],
)
def test_dropout_before(model: nn.Module, share: float, left: int) -> None:
    for mode in (True, False):
        finding = only(model.train(mode), "BN013")
        assert (finding.severity, finding.evidence["p"]) == ("info", share)
        assert f"p = {share:g}" in finding.message
        assert f"{left} %" in finding.message


def test_the_spread_that_it_tells_is_the_one_that_is_left() -> None:
    model = nn.Sequential(nn.Dropout(0.5), batchnorm.BatchNorm1d(3, momentum=None))
    x = torch.randn(100_000, 3)
    model.requires_grad_(False)(x)
    assert float(model.eval()(x).std()) == pytest.approx(0.5**0.5, abs=0.01)
    finding = only(model, "BN013")
    assert "71 %" in finding.message
    batchnorm.recalibrate(model, [x])  # what its fix says
    assert float(model(x).std()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Dropout(0.0), nn.BatchNorm1d(4)),
        nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4), nn.BatchNorm1d(4)),
        nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)),
        nn.Sequential(nn.AlphaDropout(0.5), nn.BatchNorm1d(4)),
        nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4, track_running_stats=False)),
        batchnorm.freeze(nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4))).model,
        ByFunction(0.0),
    ],
)
def test_no_dropout_before(model: nn.Module) -> None:
    assert found(model, "BN013") == ()


# BN018


def test_batch_norm_straight_before_a_padded_convolution() -> None:
    model = trained(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)))
    finding = only(model, "BN018")
    assert (finding.severity, finding.module, finding.evidence["behind"]) == ("info", "1", "2")
    assert "straight before a convolution that pads with zeros" in finding.message
    for padding in ({"padding": 0}, {"padding": 1, "padding_mode": "reflect"}):
        assert (
            found(
                nn.Sequential(nn.ReLU(), trained(nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 3, **padding)), "BN018"
            )
            == ()
        )


def test_an_activation_in_between_is_no_straight_way() -> None:
    norm = trained(batchnorm.BatchNorm2d(4, activation="relu"))
    finding = only(nn.Sequential(nn.ReLU(), norm, nn.Conv2d(4, 4, 3, padding=1)), "BN018")
    assert "pads" not in finding.message


def test_a_convolution_that_pads_nothing_is_another_reason() -> None:
    model = nn.Sequential(nn.ReLU(), trained(nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 3))
    model[2].register_forward_hook(lambda module, args, output: None)  # with which fold leaves it
    finding = only(model, "BN018")
    assert "pads" not in finding.message


def test_layers_that_fold_are_no_finding() -> None:
    model = trained(plain(nn.BatchNorm2d(4), batchnorm.BatchNorm2d(4)))
    for mode in (True, False):
        assert found(model.train(mode), "BN018") == ()
    assert len(batchnorm.fold(model.eval()).changed) == 2


def test_equal_reasons_are_one_finding_and_say_what_fold_says() -> None:
    model = trained(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()))
    finding = only(model, "BN018")
    assert (finding.module, finding.also) == ("1", ("3",))
    assert "(0)" not in finding.message
    assert "ReLU stands next to it" in finding.message
    assert finding.evidence["reason"] == batchnorm.fold(model.eval()).skipped[0].reason


def test_no_statistics_is_another_rule() -> None:
    assert found(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4, track_running_stats=False)), "BN018") == ()


# BN019


class WithChildren(nn.BatchNorm2d):
    """As those of other packages: a batch norm with layers inside."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(input)))


def test_what_a_foreign_layer_holds() -> None:
    model = trained(
        plain(WithChildren(4, nn.SiLU()), WithChildren(4, nn.SiLU()), WithChildren(4, nn.Identity()))
    )
    finding = only(model, "BN019")
    assert (finding.severity, finding.module, finding.also) == ("info", "1", ("4",))
    assert finding.evidence == {"holds": ["act (SiLU)"]}
    x = torch.randn(2, 4, 5, 5)
    before = model.eval()(x)
    assert (nn.SyncBatchNorm.convert_sync_batchnorm(model)(x) - before).abs().max() > 0.1  # and so it is


def test_what_a_layer_of_this_package_holds() -> None:
    model = plain(batchnorm.BatchNorm2d(4, activation="relu"), batchnorm.BatchNorm2d(4))
    finding = only(model, "BN019")
    assert (finding.module, finding.also) == ("1", ())
    assert "activation='relu'" in finding.message
    assert "refuse" in finding.message
    with pytest.raises(batchnorm.ModelError):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert found(plain(nn.BatchNorm2d(4), nn.SyncBatchNorm(4)), "BN019") == ()
