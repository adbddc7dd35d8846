import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm
from batchnorm.nn.member import AnyBatchNorm
from batchnorm.surgery._unnormalized import Unnormalized


def reasons(changes) -> dict[str, str]:
    return {skip.name: skip.reason for skip in changes.skipped}


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.Dropout(0.0),
        nn.SyncBatchNorm(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 5, bias=False),
        nn.BatchNorm1d(5, affine=False),
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_every_batch_norm_goes_and_the_rest_stays(training: bool, inplace: bool) -> None:
    net = conv_net().train(training)
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    changes = batchnorm.remove(net, inplace=inplace)
    plain = changes.model
    assert (plain is net) is inplace
    assert [change.name for change in changes.changed] == ["1", "5", "9"]
    assert all(type(plain[i]) is nn.Identity for i in (1, 5, 9))
    assert all(module.training is training for module in plain.modules())
    assert [change.note for change in changes.changed] == [
        "0 given a bias of zeros",
        "3 has a bias",
        "8 given a bias of zeros",
    ]
    for i in (0, 3, 8):
        assert torch.equal(plain[i].weight, weights[f"{i}.weight"])
    assert torch.equal(plain[3].bias, weights["3.bias"])
    assert torch.equal(plain[0].bias, torch.zeros(4))
    assert plain[8].bias.requires_grad
    if not inplace:
        assert isinstance(net[1], nn.BatchNorm2d)
        assert net[0].bias is None
    x = torch.randn(2, 3, 8, 8)
    hidden = F.relu(F.conv2d(x, weights["0.weight"]))
    hidden = F.relu(F.conv2d(hidden, weights["3.weight"], weights["3.bias"]))
    torch.testing.assert_close(plain(x), hidden.flatten(1) @ weights["8.weight"].T)


def test_the_bias_takes_dtype_and_requires_grad() -> None:
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)).to(torch.bfloat16)
    net[1].bias.requires_grad_(False)
    bias = batchnorm.remove(net).model[0].bias
    assert bias.dtype == torch.bfloat16
    assert not bias.requires_grad


def test_a_member_of_the_family_leaves_its_activation_too() -> None:
    model = nn.Sequential(nn.Linear(2, 3), AnyBatchNorm(3, activation="relu"))
    x = torch.randn(4, 2)
    assert torch.equal(batchnorm.remove(model).model(x), model[0](x).relu())


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "gelu"])
def test_a_layer_of_ours_leaves_its_activation_residual_and_mask(activation) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
            self.norm = batchnorm.BatchNorm2d(4, activation=activation, negative_slope=0.3)

        def forward(self, x, residual, mask):
            return self.norm(self.conv(x), residual=residual, mask=mask)

    changes = batchnorm.remove(Net())
    assert changes.notes == ()
    assert changes.changed[0].note == "conv given a bias of zeros"
    x, residual = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 5, 5)
    mask = torch.rand(2, 5, 5) < 0.5
    residual[:, :, 0, 0], mask[:, 0, 0] = float("nan"), False
    act = {None: lambda z: z, "relu": F.relu, "leaky_relu": lambda z: F.leaky_relu(z, 0.3), "gelu": F.gelu}[
        activation
    ]
    expected = act(changes.model.conv(x) + residual).masked_fill(~mask.unsqueeze(1), 0.0)
    output = changes.model(x, residual, mask)
    assert torch.equal(output, expected)
    (output * torch.randn_like(output)).sum().backward()
    assert torch.isfinite(changes.model.conv.weight.grad).all()


def test_what_stands_in_for_our_layer_takes_every_call() -> None:
    x = torch.randn(2, 3, 4)
    stand_in = Unnormalized("leaky_relu", 0.5)
    assert torch.equal(stand_in(x), F.leaky_relu(x, 0.5))
    weights = torch.tensor([0.0, 1.0, 2.5, 0.0])  # no batch axis: it broadcasts
    assert torch.equal(stand_in(x, None, weights), F.leaky_relu(x, 0.5) * (weights != 0))
    assert repr(stand_in) == "Unnormalized(activation='leaky_relu', negative_slope=0.5)"
    traced = torch.fx.symbolic_trace(stand_in)
    assert torch.equal(traced(x, x, weights), stand_in(x, x, weights))
    with pytest.raises(batchnorm.InputError, match="activation"):
        Unnormalized("swish")


@pytest.mark.parametrize(
    "lazy",
    [nn.LazyBatchNorm2d(), nn.LazyBatchNorm2d(affine=False), batchnorm.LazyBatchNorm2d(activation="relu")],
)
def test_a_lazy_layer_goes_once_it_has_a_shape(lazy) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), lazy)
    changes = batchnorm.remove(net)
    assert changes.changed == ()
    assert "run one batch" in reasons(changes)["1"]
    net(torch.randn(2, 3, 5, 5))
    assert len(batchnorm.remove(net).changed) == 1


def test_a_subclass_with_a_forward_of_its_own_stays() -> None:
    class WithActivation(nn.BatchNorm2d):
        def forward(self, x):
            return F.relu(super().forward(x))

    class Renamed(nn.BatchNorm2d):
        pass

    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), WithActivation(4), nn.Conv2d(4, 4, 3), Renamed(4))
    net.append(nn.BatchNorm2d(4))
    net[4].forward = lambda x: x + 1
    changes = batchnorm.remove(net)
    assert [change.name for change in changes.changed] == ["3"]
    assert "forward of its own" in reasons(changes)["1"]
    assert "forward of its own" in reasons(changes)["4"]
    assert changes.model[0].bias is None


def test_hooks_and_foreign_layers_are_reported() -> None:
    class FrozenBatchNorm2d(nn.Module):
        def forward(self, x):
            return x

    net = nn.Sequential(nn.BatchNorm2d(3), FrozenBatchNorm2d())
    net[0].register_forward_hook(lambda *_: None)
    changes = batchnorm.remove(net)
    assert changes.changed == ()
    assert "forward hook" in reasons(changes)["0"]
    assert "not a subclass" in reasons(changes)["1"]


def test_a_batch_norm_whose_statistics_are_read_stays() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            x = self.a(x) * self.a.weight
            x = self.b(x) + self.b.eps
            return self.c(x)

    changes = batchnorm.remove(Net())
    assert [change.name for change in changes.changed] == ["c"]
    assert "reads its weight" in reasons(changes)["a"]
    assert "reads its attribute 'eps'" in reasons(changes)["b"]


def test_one_batch_norm_behind_two_layers() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.norm = self.same = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.a(x)) + self.same(self.b(x))

    changes = batchnorm.remove(Shared())
    assert changes.changed[0].also == ("same",)
    assert changes.changed[0].note == "a given a bias of zeros; b given a bias of zeros"
    assert changes.model.norm is changes.model.same


def test_a_layer_whose_channels_are_not_those_of_the_batch_norm_gets_no_bias() -> None:
    net = nn.Sequential(nn.Linear(3, 8, bias=False), nn.Unflatten(1, (2, 4)), nn.BatchNorm1d(2))
    changes = batchnorm.remove(net)
    assert changes.changed[0].note == "0 not given a bias: its channels are not the batch norm's"
    assert changes.model[0].bias is None


class PreActivated(nn.Module):
    """Batch norm before the convolution; the order of definition misleads, the trace does not."""

    def __init__(self, branching: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 3, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(3)
        self.branching = branching

    def forward(self, x):
        if self.branching and x.sum() > 1e9:
            return x
        return self.norm2(self.conv2(F.relu(self.norm1(x + self.conv1(x)))))


def test_the_layer_before_is_found_by_trace_and_by_order_where_there_is_none() -> None:
    traced = batchnorm.remove(PreActivated(False))
    assert [change.note for change in traced.changed] == [
        "conv2 given a bias of zeros",
        "no convolution or linear layer right before it",
    ]
    assert traced.notes == ()
    assert traced.model.conv1.bias is None
    ordered = batchnorm.remove(PreActivated(True))
    assert len(ordered.changed) == 2
    assert "could not be traced" in ordered.notes[0]
    assert ordered.model.conv1.bias is not None


@pytest.mark.parametrize("inplace", [True, False])
def test_a_batch_norm_that_is_the_whole_model(inplace: bool) -> None:
    norm = batchnorm.BatchNorm1d(3, activation="relu")
    changes = batchnorm.remove(norm, inplace=inplace)
    assert changes.changed[0].name == ""
    assert torch.equal(changes.model(torch.tensor([[-1.0, 0.0, 2.0]])), torch.tensor([[0.0, 0.0, 2.0]]))
    assert (changes.revert() is norm) is inplace
    assert type(changes.model) is batchnorm.BatchNorm1d


def test_a_model_without_batch_norm_comes_back_as_it_is() -> None:
    net = nn.Sequential(nn.Linear(3, 3))
    changes = batchnorm.remove(net)
    assert (changes.changed, changes.skipped) == ((), ())
    assert torch.equal(changes.model[0].weight, net[0].weight)


def test_insert_then_remove_is_the_plain_network() -> None:
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(64, 2)
    )
    for i in (0, 2):
        nn.init.zeros_(plain[i].bias)
    x = torch.randn(3, 3, 8, 8)
    inserted = batchnorm.insert(plain)
    assert not torch.allclose(inserted.model(x), plain(x))
    removed = batchnorm.remove(inserted.model)
    assert len(removed.changed) == len(inserted.changed) == 2
    assert torch.equal(removed.model(x), plain(x))
    assert torch.equal(inserted.revert()(x), plain(x))


def test_remove_then_insert_has_the_weights_of_the_original() -> None:
    blocks = [(nn.Linear(n, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU()) for n in (4, 5)]
    net = nn.Sequential(*(layer for block in blocks for layer in block))
    net.append(nn.Linear(5, 2))
    again = batchnorm.insert(batchnorm.remove(net).model).model
    assert [type(m).__name__ for m in again.modules()].count("BatchNorm1d") == 2
    x = torch.randn(6, 4)
    torch.testing.assert_close(again(x), net(x))
    assert again[0][0].bias is None


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripting_what_stays_of_our_layer_is_refused_clearly() -> None:
    model = batchnorm.remove(nn.Sequential(batchnorm.BatchNorm1d(3, activation="relu"))).model
    with pytest.raises(batchnorm.ModelError, match=r"torch.jit.script: got a model with a Unnormalized"):
        torch.jit.script(model)
