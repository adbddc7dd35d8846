import pytest
import torch
from surgery_helpers import Residual, names, reasons, train_one_step
from torch import nn
from torch.nn import functional as F

import batchnorm


def test_mlp() -> None:
    net = nn.Sequential(
        nn.Flatten(),
        nn.Linear(6, 5),
        nn.Sigmoid(),
        nn.Linear(5, 4),
        nn.Dropout(0.0),
        nn.Tanh(),
        nn.Linear(4, 3),
    )
    changes = batchnorm.insert(net)
    assert names(changes) == ["1", "3"]
    assert reasons(changes) == {"6": "its output is the model's output"}
    linear, norm = changes.model[1]
    assert type(norm) is batchnorm.BatchNorm1d
    assert norm.num_features == 5
    assert linear.bias is None
    assert torch.equal(linear.weight, net[1].weight)
    assert changes.model[6].bias is not None
    train_one_step(changes.model, torch.randn(8, 2, 3))


@pytest.mark.parametrize("functional", [False, True])
def test_residual_network_gets_conv_bn_add_relu(functional: bool) -> None:
    changes = batchnorm.insert(Residual(functional))
    convs = [f"blocks.{block}.{conv}" for block in "01" for conv in ("conv1", "conv2", "short")]
    assert names(changes) == ["stem", *convs]
    assert set(reasons(changes)) == {"head"}
    assert changes.notes == ()
    block = changes.model.blocks[0].train()
    x = torch.randn(5, 4, 6, 6)
    # The block written out, with PyTorch's batch norm: the position is right before the addition.
    conv1, conv2, short = (
        lambda v, pair=pair: F.batch_norm(
            F.conv2d(v, pair[0].weight, padding=pair[0].padding), None, None, training=True
        )
        for pair in (block.conv1, block.conv2, block.short)
    )
    expected = F.relu(conv2(F.relu(conv1(x))) + short(x))
    torch.testing.assert_close(block(x), expected)
    train_one_step(changes.model, torch.randn(6, 3, 12, 12))


@pytest.mark.parametrize(
    ("producer", "norm", "shape"),
    [
        (nn.Conv1d(2, 3, 2), batchnorm.BatchNorm1d, (4, 2, 5)),
        (nn.Conv2d(2, 3, 2), batchnorm.BatchNorm2d, (4, 2, 5, 5)),
        (nn.Conv3d(2, 3, 2), batchnorm.BatchNorm3d, (4, 2, 5, 5, 5)),
        (nn.ConvTranspose1d(2, 3, 2), batchnorm.BatchNorm1d, (4, 2, 5)),
        (nn.ConvTranspose2d(2, 3, 2), batchnorm.BatchNorm2d, (4, 2, 5, 5)),
        (nn.ConvTranspose3d(2, 3, 2), batchnorm.BatchNorm3d, (4, 2, 5, 5, 5)),
        (nn.Linear(2, 3), batchnorm.BatchNorm1d, (4, 2)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_each_kind_of_layer(producer, norm, shape) -> None:
    net = nn.Sequential(producer, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)).double()
    x = torch.randn(shape, dtype=torch.float64)
    net(x)
    net[0].eval()
    changes = batchnorm.insert(net, inplace=True)
    assert type(net[0][1]) is norm
    assert net[0][1].weight.dtype == net[0][1].running_mean.dtype == torch.float64
    assert net[0][1].training is net[0].training is False
    assert net[0][0] is producer
    assert changes.model(x).shape == (4, 2)


ACTIVATIONS = [
    *(lambda x, f=f: f(x) for f in (F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.silu, F.gelu, F.mish)),
    *(
        lambda x, f=f: f(x)
        for f in (F.hardswish, F.hardtanh, F.softplus, torch.sigmoid, torch.tanh, torch.relu)
    ),
    lambda x: x.sigmoid(),
    lambda x: x.tanh(),
    lambda x: x * torch.sigmoid(x),
    lambda x: x.relu_(),
    *(nn.PReLU(), nn.ReLU6(), nn.CELU(), nn.Hardswish(), nn.Softsign()),
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_as_functions_methods_and_layers(activation) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 2)
            self.act = activation

        def forward(self, x):
            return self.outer(self.act(self.inner(x)))

    assert names(batchnorm.insert(Net())) == ["inner"]


def test_the_output_activation_is_not_hidden() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1), nn.Sigmoid(), nn.Flatten(0))
    changes = batchnorm.insert(net)
    assert names(changes) == ["0"]
    assert reasons(changes) == {"2": "Sigmoid (3), which it feeds, is the model's output and not hidden"}


def test_an_activation_that_is_used_inside_and_returned_is_hidden() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            hidden = torch.relu(self.a(x))
            last = torch.relu(self.b(hidden))
            return {"hidden": hidden, "last": last.view(last.size(0), -1)}

    changes = batchnorm.insert(Net())
    assert names(changes) == ["a"]
    assert list(reasons(changes)) == ["b"]


class Odd(nn.Module):
    """One of each layer that must be left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.ok = nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.normed = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.tied_a, self.tied_b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied_b.weight = self.tied_a.weight
        self.scaled = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.linear_then_linear = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.read = nn.Linear(4, 4)
        self.lazy = nn.LazyLinear(4)
        self.complex = nn.Linear(4, 4, dtype=torch.complex64)
        self.up = nn.ConvTranspose1d(4, 4, 2)

    def forward(self, x):
        x = torch.relu(self.ok(x))
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        x = torch.relu(self.norm(self.normed(x)))
        x = torch.relu(self.tied_b(torch.relu(self.tied_a(x))))
        x = torch.relu(self.scaled(x))
        x = torch.relu(self.read(x)) @ self.read.weight
        x = torch.relu(self.lazy(x))
        x = torch.sigmoid(self.complex(x).real)
        x = torch.relu(self.up(x[:, :, None], output_size=[2])).flatten(1)
        return self.ok.weight.sum() + self.linear_then_linear(x)


def test_what_is_skipped_says_why() -> None:
    net = Odd()
    changes = batchnorm.insert(net)
    assert names(changes) == []
    expected = {
        "ok": "reads its weight without calling it",
        "twice": "called 2 times",
        "normed": r"LayerNorm (norm) already follows it",
        "tied_a": "shares a parameter",
        "tied_b": "shares a parameter",
        "scaled": "parametrization",
        "linear_then_linear": "its output is the model's output",
        "unused": "does not call it",
        "read": "reads its weight without calling it",
        "lazy": "run one batch",
        "complex": "complex64",
        "up": "called with more than its input",
    }
    found = reasons(changes)
    assert found.keys() == expected.keys()
    for name, part in expected.items():
        assert part in found[name], name


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.RMSNorm([4, 4])]
)
def test_a_layer_that_is_normalized_already_is_left_alone(norm) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), norm, nn.ReLU(), nn.Conv2d(4, 4, 3))
    changes = batchnorm.insert(net)
    assert reasons(changes)["0"] == f"{type(norm).__name__} (2) already follows it"


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 4, 2, 2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.neck, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x)[0]
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(F.gelu(self.neck(x.mean(1))))


def test_a_linear_layer_with_its_channels_last_is_skipped_and_one_behind_the_pooling_is_not() -> None:
    changes = batchnorm.insert(Tokens())
    assert names(changes) == ["neck"]
    assert "3 axes with the channels last" in reasons(changes)["up"]
    assert "part of MultiheadAttention" in reasons(changes)["attention.out_proj"]
    assert changes.model(torch.randn(4, 3, 8, 8)).shape == (4, 2)


def test_one_layer_under_two_names_is_wrapped_once() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.Linear(3, 3)
            self.out = nn.Linear(3, 2)

        def forward(self, x):
            return self.out(torch.relu(self.b(x)))

    changes = batchnorm.insert(Net())
    assert changes.changed[0].name == "a"
    assert changes.changed[0].also == ("b",)
    assert changes.model.a is changes.model.b
