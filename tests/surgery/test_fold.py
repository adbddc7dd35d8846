import copy

import pytest
import torch
from surgery_helpers import names, randomize, reasons
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import batchnorm
from batchnorm.surgery._unnormalized import Rows, Unnormalized

CONV = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d),
}


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def check(model: nn.Module, x: torch.Tensor, folded: int, example: object = None) -> batchnorm.Changes:
    """The folded model equals the model, which is untouched; `folded` batch norms are gone; revert brings them back."""
    model = randomize(model).double().eval()
    x = x.double()
    state, before = copy.deepcopy(model.state_dict()), model(x)
    changes = batchnorm.fold(model, example)
    assert (len(changes.changed), norms(changes.model)) == (folded, norms(model) - folded), str(changes)
    torch.testing.assert_close(changes.model(x), before, rtol=1e-12, atol=1e-12)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    again = changes.revert()
    assert list(again.state_dict()) == list(state)
    assert torch.equal(again(x), before)
    return batchnorm.fold(model, example)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_convolutions(axes: int, transposed: bool, bias: bool, affine: bool, groups: int) -> None:
    conv = CONV[axes][transposed](6, 9, 3, stride=2, padding=1, groups=groups, bias=bias)
    net = nn.Sequential(conv, CONV[axes][2](9, affine=affine), nn.ReLU())
    changes = check(net, torch.randn(2, 6, *[5] * axes), 1)
    assert changes.changed[0].note == "folded into 0" + ("" if bias else ", which has a bias now")
    assert isinstance(changes.model[1], nn.Identity)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_batch_norm_before_a_convolution_without_padding(axes: int, groups: int, bias: bool) -> None:
    conv = CONV[axes][0](6, 9, 3, stride=2, groups=groups, bias=bias)
    check(nn.Sequential(CONV[axes][2](6), conv), torch.randn(2, 6, *[7] * axes), 1)


def test_batch_norm_before_a_convolution_with_padding() -> None:
    x = torch.randn(2, 4, 7, 7)
    for mode in ("reflect", "replicate", "circular"):
        check(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3, padding=1, padding_mode=mode)), x, 1)
    check(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3, padding="valid")), x, 1)
    check(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1, padding="same")), x, 1)
    for padding in (1, (0, 1), "same"):
        changes = check(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3, padding=padding)), x, 0)
        assert reasons(changes)["0"].endswith("the zeros that the layer pads its input with do not get it")
    net = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3, padding=1)).double().eval()
    net[0].running_var.uniform_(0.5, 2)
    net[0].weight.data.uniform_(-1, 1)
    changes = batchnorm.fold(net)
    assert names(changes) == ["0"]
    torch.testing.assert_close(changes.model(x.double()), net(x.double()))


def test_batch_norm_before_a_transposed_convolution() -> None:
    x = torch.randn(2, 6, 5, 5)
    for groups in (1, 2):
        check(nn.Sequential(nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 4, 1, groups=groups)), x, 1)
    for options in ({"kernel_size": 3}, {"kernel_size": 1, "stride": 2}, {"kernel_size": 1, "padding": 1}):
        changes = check(nn.Sequential(nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 4, **options)), x, 0)
        assert "unequally often" in reasons(changes)["0"]


def test_linear_layers() -> None:
    x = torch.randn(5, 4)
    changes = check(nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3), nn.Tanh()), x, 1)
    assert isinstance(changes.model[1], Rows)
    (note,) = changes.notes
    assert "was not seen for 1: Rows stays there, which raises an error" in note
    assert f"note: {note}" in str(changes)
    seen = batchnorm.fold(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval(), x)
    assert not any("Rows" in note for note in seen.notes)
    check(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)), x, 1)
    check(
        nn.Sequential(nn.Flatten(), nn.Linear(8, 3), nn.BatchNorm1d(3, affine=False)), torch.randn(5, 2, 4), 1
    )
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 3), nn.BatchNorm1d(3))
    assert isinstance(check(net, torch.randn(5, 2, 4), 1).model[2], nn.Identity)


def test_a_linear_layer_with_its_channels_last_is_never_folded_wrongly() -> None:
    net = randomize(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))).double().eval()
    rows, sequences = torch.randn(5, 4).double(), torch.randn(5, 3, 4).double()
    blind = batchnorm.fold(net).model
    torch.testing.assert_close(blind(rows), net(rows))
    with pytest.raises(batchnorm.InputError, match=r"expected \(N, C\)"):
        blind(sequences)
    changes = batchnorm.fold(net, sequences)
    assert "more than two axes" in reasons(changes)["1"]
    assert isinstance(batchnorm.fold(net, rows).model[1], nn.Identity)


class Net(nn.Module):
    """A forward made of a function and layers."""

    def __init__(self, run, **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


def test_a_linear_layer_behind_a_recurrent_one_is_left_alone() -> None:
    net = Net(
        lambda self, x: self.bn(self.fc(self.rnn(x)[0])),
        rnn=nn.GRU(4, 4, batch_first=True),
        fc=nn.Linear(4, 5),
        bn=nn.BatchNorm1d(5),
    )
    assert "more than two axes" in reasons(check(net, torch.randn(2, 5, 4), 0))["bn"]


def test_a_convolution_called_without_a_batch_axis() -> None:
    net = randomize(nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4))).eval()
    changes = batchnorm.fold(net, torch.randn(3, 5))
    assert "without a batch axis" in reasons(changes)["1"]


def test_chains() -> None:
    x = torch.randn(2, 3, 5, 5)
    check(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), x, 2)
    check(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), x, 2)
    check(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 4, 3)), x, 2)
    changes = check(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU()), x, 1)
    assert changes.changed[0].note == "folded into 1"
    changes = check(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False), nn.ReLU()), x, 0)
    assert "has no weight and bias to take it" in reasons(changes)["0"]
    check(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU()), x, 2)
    check(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.Dropout(0.5), nn.BatchNorm2d(4)), x, 1)
    function = Net(
        lambda self, x: self.bn(F.dropout(self.conv(x), 0.5, self.training)),
        conv=nn.Conv2d(3, 4, 3),
        bn=nn.BatchNorm2d(4),
    )
    check(function, x, 1)


def test_several_layers_behind_one_batch_norm() -> None:
    def layers() -> dict[str, nn.Module]:
        return {"bn": nn.BatchNorm2d(3), "a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(3, 4, 1)}

    x = torch.randn(2, 3, 5, 5)

    def both(self, x):
        x = self.bn(x)
        return self.a(x) * self.b(x).sum(1, keepdim=True)

    changes = check(Net(both, **layers()), x, 1)
    assert changes.changed[0].note == "folded into a and b"

    def elsewhere(self, x):
        y = self.bn(x)
        return self.a(y) + self.b(y) + y.mean()

    assert "it feeds mean" in reasons(check(Net(elsewhere, **layers()), x, 0))["bn"]
    other = Net(lambda self, x: self.a(self.bn(x)) + self.a(x), **layers())
    assert "called behind other layers" in reasons(check(other, x, 0))["bn"]


def test_what_else_the_convolution_feeds() -> None:
    def layers() -> dict[str, nn.Module]:
        return {"conv": nn.Conv2d(3, 3, 3, padding=1), "bn": nn.BatchNorm2d(3), "bn2": nn.BatchNorm2d(3)}

    x = torch.randn(2, 3, 5, 5)

    def skip(self, x):
        y = self.conv(x)
        return self.bn(y) + y

    assert "also feeds add" in reasons(check(Net(skip, **layers()), x, 0))["bn"]

    def inplace(self, x):
        y = self.conv(x)
        y.mul_(2)
        return self.bn(y)

    assert "also feeds mul_" in reasons(check(Net(inplace, **layers()), x, 0))["bn"]

    def two(self, x):
        return self.bn(self.conv(x)) + self.bn2(self.conv(x * 2))

    found = reasons(check(Net(two, **layers()), x, 0))
    assert "also feeds BatchNorm2d (bn2)" in found["bn"]
    assert "also feeds BatchNorm2d (bn)" in found["bn2"]

    def shape(self, x):
        y = self.conv(x)
        return self.bn(y).reshape(y.shape[0], y.size(1), -1)

    assert names(check(Net(shape, **{k: v for k, v in layers().items() if k != "bn2"}), x, 1)) == ["bn"]

    def returned(self, x):
        y = self.conv(x)
        return self.bn(y), y

    assert "also feeds the model's output" in reasons(batchnorm.fold(Net(returned, **layers()).eval()))["bn"]

    def stored(self, x):
        self.seen = [self.conv(x)]
        return self.bn(self.seen[0])

    assert "kept as an attribute" in reasons(batchnorm.fold(Net(stored, **layers()).eval()))["bn"]


def test_a_pair_that_is_used_twice_is_folded_once() -> None:
    def twice(self, x):
        return self.bn(self.conv(self.bn(self.conv(x)).relu()))

    net = Net(twice, conv=nn.Conv2d(3, 3, 3), bn=nn.BatchNorm2d(3))
    assert names(check(net, torch.randn(2, 3, 7, 7), 1)) == ["bn"]
    pair = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    changes = check(nn.Sequential(pair, nn.ReLU(), pair), torch.randn(2, 3, 7, 7), 1)
    assert changes.changed[0].also == ("2.1",)
    assert changes.model[0] is changes.model[2]


def test_a_batch_norm_behind_two_convolutions_stays() -> None:
    net = Net(
        lambda self, x: self.bn(self.a(x)) + self.bn(self.b(x)),
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(3, 4, 1),
        bn=nn.BatchNorm2d(4),
    )
    assert "behind several layers" in reasons(check(net, torch.randn(2, 3, 4, 4), 0))["bn"]


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu"])
def test_a_held_activation_stays(activation: str) -> None:
    norm = batchnorm.BatchNorm2d(4, activation=activation, negative_slope=0.3)
    changes = check(nn.Sequential(nn.Conv2d(3, 4, 3), norm), torch.randn(2, 3, 5, 5), 1)
    assert type(changes.model[1]).__name__.lower() == activation.replace("_", "")
    before = check(nn.Sequential(norm, nn.Conv2d(4, 3, 1)), torch.randn(2, 4, 5, 5), 0)
    assert "its activation, residual or mask comes before" in reasons(before)["0"]
    rows = nn.Sequential(nn.Linear(3, 4), batchnorm.BatchNorm1d(4, activation=activation))
    assert isinstance(check(rows, torch.randn(2, 3), 1).model[1][0], Rows)


def test_a_residual_and_a_mask_stay() -> None:
    def run(self, x):
        return self.bn(self.conv(x), residual=x, mask=self.mask)

    net = Net(run, conv=nn.Conv2d(3, 3, 3, padding=1), bn=batchnorm.BatchNorm2d(3, activation="relu"))
    net.register_buffer("mask", torch.ones(5, 5) > 0)
    net.mask[2:] = False
    assert isinstance(check(net, torch.randn(2, 3, 5, 5), 1).model.bn, Unnormalized)

    def itself(self, x):
        y = self.conv(x)
        return self.bn(y, y)

    net = Net(itself, conv=nn.Conv2d(3, 3, 3), bn=batchnorm.BatchNorm2d(3))
    assert "also feeds BatchNorm2d (bn)" in reasons(check(net, torch.randn(2, 3, 5, 5), 0))["bn"]
    linear = Net(lambda self, x: self.bn(self.fc(x), x), fc=nn.Linear(3, 3), bn=batchnorm.BatchNorm1d(3))
    x = torch.randn(2, 3)
    assert "pass an example" in reasons(check(linear, x, 0))["bn"]
    check(linear, x, 1, example=x.double())


def pair() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_a_model_in_training_mode_is_an_error_and_a_layer_in_it_stays() -> None:
    net = pair()
    with pytest.raises(batchnorm.ModelError, match=r"Call model\.eval\(\) first"):
        batchnorm.fold(net)
    net.eval()[1].train()
    assert "training mode" in reasons(batchnorm.fold(net))["1"]
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert "no running statistics" in reasons(batchnorm.fold(net))["1"]


def test_what_is_refused() -> None:
    def reason(change) -> str:
        net = pair()
        change(net)
        net.eval()
        changes = batchnorm.fold(net)
        assert not changes.changed
        return reasons(changes)["1"]

    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    class Inner(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight * 2, bias)

    class OwnNorm(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    assert "Conv2d (0) stands next to it: it carries a forward hook" in reason(
        lambda net: net[0].register_forward_hook(lambda *_: None)
    )
    assert "forward pre-hook" in reason(lambda net: net[1].register_forward_pre_hook(lambda *_: None))
    assert "parametrization" in reason(lambda net: parametrizations.weight_norm(net[0]))
    assert "Own has a forward of its own" in reason(lambda net: net.__setitem__(0, Own(3, 4, 3)))
    assert "Inner has a forward of its own" in reason(lambda net: net.__setitem__(0, Inner(3, 4, 3)))
    assert "OwnNorm has a forward of its own" in reason(lambda net: net.__setitem__(1, OwnNorm(4)))
    assert "its weight is torch.complex64" in reason(
        lambda net: setattr(net[0], "weight", nn.Parameter(net[0].weight.to(torch.complex64)))
    )
    assert "run one batch" in reason(lambda net: net.__setitem__(1, nn.LazyBatchNorm2d()))
    assert "run one batch" in reason(lambda net: net.__setitem__(0, nn.LazyConv2d(4, 3)))
    assert "ReLU (0)" in reason(lambda net: net.__setitem__(0, nn.ReLU()))
    assert "meta device" in reason(lambda net: net.to("meta"))


def test_tied_weights_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).eval()
    net[2].weight = net[0].weight
    assert "shares a parameter" in reasons(batchnorm.fold(net))["1"]
    read = Net(
        lambda self, x: self.bn(self.fc(x)) + self.fc.weight.sum(), fc=nn.Linear(3, 3), bn=nn.BatchNorm1d(3)
    )
    assert "the model reads its weight" in reasons(batchnorm.fold(read.eval()))["bn"]


def test_a_weight_that_does_not_fit_its_dtype_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).half().eval()
    net[1].running_var.fill_(1e-7)
    net[1].weight.data.fill_(6e4)
    net[0].weight.data.fill_(100)
    assert "does not fit torch.float16" in reasons(batchnorm.fold(net))["1"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_folded_weight_is_the_exact_one_rounded_once(dtype: torch.dtype) -> None:
    net = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval().to(dtype)
    conv, norm = copy.deepcopy(net).double()
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    folded = batchnorm.fold(net).model[0]
    assert torch.equal(folded.weight, (conv.weight * scale[:, None, None, None]).to(dtype))
    bias = (scale * (conv.bias - norm.running_mean) + norm.bias).to(dtype)
    assert torch.equal(folded.bias, bias)
    assert folded.weight.requires_grad
    net.requires_grad_(False)
    assert not batchnorm.fold(net).model[0].bias.requires_grad


def test_channels_last_and_the_inputs_are_kept() -> None:
    net = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    net = net.to(memory_format=torch.channels_last)
    folded = batchnorm.fold(net).model[0].weight
    assert folded.is_contiguous(memory_format=torch.channels_last)


def test_inplace_and_revert() -> None:
    net = randomize(pair()).eval()
    conv, norm = net
    weight, bias, x = conv.weight, conv.bias, torch.randn(2, 3, 5, 5)
    before = net(x)
    changes = batchnorm.fold(net, inplace=True)
    assert changes.model is net
    assert isinstance(net[1], nn.Identity)
    assert net[0] is conv
    assert changes.revert() is net
    assert (net[1] is norm, conv.weight is weight, conv.bias is bias) == (True, True, True)
    assert torch.equal(net(x), before)
    merged = randomize(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU())).eval()
    mean, gamma, before = merged[1].running_mean, merged[1].weight, merged(x)
    batchnorm.fold(merged, inplace=True).revert()
    assert merged[1].running_mean is mean
    assert merged[1].weight is gamma
    assert torch.equal(merged(x), before)
