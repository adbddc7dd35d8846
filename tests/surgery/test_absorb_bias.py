import copy

import pytest
import torch
from surgery_helpers import names, notes, randomize, reasons
from torch import nn

import batchnorm


def check(model: nn.Module, x: torch.Tensor, dropped: list[str], example: object = None) -> batchnorm.Changes:
    """The same outputs in evaluation and in training, and the same running means but for the bias."""
    model, x = randomize(model).double(), x.double()
    changes = batchnorm.absorb_bias(model, example)
    assert names(changes) == dropped
    lean = changes.model
    assert all(lean.get_submodule(name).bias is None for name in dropped)
    for training in (False, True, False):
        with torch.no_grad():
            a, b = copy.deepcopy(model).train(training), copy.deepcopy(lean).train(training)
            torch.testing.assert_close(b(x), a(x), rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(b.eval()(x), a.eval()(x), rtol=1e-11, atol=1e-11)
    again = changes.revert()
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    return batchnorm.absorb_bias(model, example)


@pytest.mark.parametrize("track", [True, False])
def test_layers(track: bool) -> None:
    options = {"track_running_stats": track}
    x = torch.randn(4, 3, 6, 6)
    check(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, **options), nn.ReLU()), x, ["0"])
    check(
        nn.Sequential(nn.ConvTranspose2d(3, 4, 3), batchnorm.BatchNorm2d(4, activation="relu", **options)),
        x,
        ["0"],
    )
    changes = check(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, **options)), torch.randn(5, 3), ["0"])
    assert notes(changes) == {"0": "its bias absorbed by 1; its input taken to be (N, C)"}
    flat = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.BatchNorm1d(4, **options))
    assert notes(check(flat, torch.randn(5, 3, 2), ["1"])) == {"1": "its bias absorbed by 2"}
    assert check(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), x, []).skipped == ()


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(x))


class Twice(Shared):
    def forward(self, x):
        return self.bn(self.conv(super().forward(x)))


class Elsewhere(Shared):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class Different(Shared):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.other(self.conv(x * 2))


class InTraining(Shared):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if self.training else y


def test_what_shares_the_output() -> None:
    x = torch.randn(4, 3, 5, 5)
    check(Shared(), x, ["conv"])
    check(Twice(), x, ["conv"])
    assert "also feeds add" in reasons(check(Elsewhere(), x, []))["bn"]
    assert set(reasons(check(Different(), x, []))) == {"bn", "other"}


def test_a_call_in_training_alone() -> None:
    model = InTraining()
    changes = batchnorm.absorb_bias(model)
    assert "called without it" in reasons(changes)["bn"]
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(changes.model.eval()(x), model.eval()(x))


def test_what_is_refused() -> None:
    def reason(change) -> str:
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
        change(model)
        changes = batchnorm.absorb_bias(model)
        assert not changes.changed
        return reasons(changes)["1"]

    assert "forward hook" in reason(lambda net: net[0].register_forward_hook(lambda *_: None))
    assert "forward pre-hook" in reason(lambda net: net[1].register_forward_pre_hook(lambda *_: None))
    assert "shares a parameter" in reason(lambda net: setattr(net[2], "bias", net[0].bias))
    assert "run one batch" in reason(lambda net: net.__setitem__(1, nn.LazyBatchNorm1d()))
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    assert "more than two axes" in reasons(batchnorm.absorb_bias(model, torch.randn(5, 3, 4)))["1"]
    dropped = nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.BatchNorm1d(3))
    assert not batchnorm.absorb_bias(dropped).changed


def test_an_example_is_checked() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).eval()
    changes = batchnorm.absorb_bias(model, torch.randn(2, 3, 4, 4))
    assert changes.notes[0].startswith("on the example, output: max abs error")
