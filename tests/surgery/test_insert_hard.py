"""Models that cannot be traced, that look at their own layers, or that something is wrong with."""

import random

import pytest
import torch
from surgery_helpers import Residual, names, reasons, train_one_step
from torch import nn
from torch.nn import functional as F

import batchnorm
from batchnorm.surgery import _insert


class Branching(nn.Module):
    """What torch.fx cannot follow: a branch on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0), nn.ReLU(), nn.Linear(4, 4))
        self.fc, self.act = nn.Linear(4, 4), nn.Tanh()
        self.fc2, self.norm, self.act2 = nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh()
        self.out, self.last = nn.Linear(4, 2), nn.Sigmoid()

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        # Bent by the sigmoid: a constant added in front of a linear layer and batch norm would have no gradient at all.
        x = self.act(self.fc(torch.sigmoid(self.body(x))))
        return self.last(self.out(self.act2(self.norm(self.fc2(x)))))


def test_an_untraceable_model_is_treated_by_order() -> None:
    changes = batchnorm.insert(Branching())
    assert names(changes) == ["body.0", "fc"]
    assert "could not be traced (TraceError" in changes.notes[0]
    assert reasons(changes) == {
        "body.3": "no activation layer follows it in its parent",
        "fc2": "LayerNorm (norm) already follows it",
        "out": "Sigmoid (last), which it feeds, is the last layer and not hidden",
    }
    train_one_step(changes.model, torch.randn(8, 4))


def test_an_untraceable_model_of_sequences_keeps_its_linear_layers() -> None:
    net = Branching()
    net.embed = nn.Embedding(3, 4)
    changes = batchnorm.insert(net)
    assert names(changes) == []
    assert "the model holds Embedding" in reasons(changes)["fc"]


def test_the_end_of_a_sequence_may_be_cut_off_before_the_activation() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv1d(2, 3, 3, padding=2), nn.Linear(3, 1)

        def forward(self, x):
            y = self.out(torch.relu(self.conv(x)[:, :, :-2].contiguous())[:, :, -1])
            return y.view(y.size(0))

    changes = batchnorm.insert(Causal())
    assert names(changes) == ["conv"]
    assert reasons(changes) == {"out": "its output is the model's output"}
    train_one_step(changes.model, torch.randn(4, 2, 6))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_a_wrapped_model_is_traced_inside(wrap) -> None:
    changes = batchnorm.insert(wrap(Residual(True)))
    assert changes.notes == ()
    assert [name.split(".", 1)[1] for name in names(changes)] == names(batchnorm.insert(Residual(True)))
    assert changes.model(torch.randn(2, 3, 12, 12)).shape == (2, 2)


def test_a_forward_that_reads_an_attribute_of_a_layer_keeps_that_layer() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            x = torch.relu(self.a(x.view(-1, self.a.in_features)))
            return self.out(torch.relu(self.b(x)))

    net = Net()
    changes = batchnorm.insert(net, inplace=True)
    assert names(changes) == ["b"]
    assert "reads its attribute 'in_features'" in reasons(changes)["a"]
    assert type(net.a) is nn.Linear
    assert net.a.bias is not None
    net(torch.randn(4, 3))


def test_a_forward_that_asks_for_the_type_of_a_layer_keeps_that_layer() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Tanh()])
            self.out = nn.Linear(3, 1)

        def forward(self, x):
            for layer in self.layers:
                if isinstance(layer, nn.Linear | nn.ReLU | nn.Tanh):
                    x = layer(x)
            return self.out(x)

    changes = batchnorm.insert(Net())
    assert names(changes) == []
    assert "decides by the type" in reasons(changes)["layers.0"]


def test_a_forward_that_cannot_take_a_replacement_at_all_is_refused_and_nothing_is_changed() -> None:
    class Net(nn.Sequential):
        def forward(self, x):
            if any(isinstance(layer, nn.Sequential) for layer in self):
                raise TypeError("flat layers only")
            return super().forward(x)

    net = Net(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    before = list(net)
    with pytest.raises(batchnorm.ModelError, match="flat layers only"):
        batchnorm.insert(net, inplace=True)
    assert all(a is b for a, b in zip(net, before, strict=True))
    assert net[0].bias is not None


def test_a_failure_while_planning_changes_nothing(monkeypatch) -> None:
    made = []

    class Failing(batchnorm.BatchNorm1d):
        def __init__(self, *args, **kwargs) -> None:
            made.append(1)
            if len(made) == 2:
                raise MemoryError
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(_insert.kinds, "batch_norm_class", lambda module: Failing)
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    before, biases = list(net), [id(p) for p in net.parameters()]
    with pytest.raises(MemoryError):
        batchnorm.insert(net, inplace=True)
    assert len(made) == 2
    assert all(a is b for a, b in zip(net, before, strict=True))
    assert [id(p) for p in net.parameters()] == biases


def test_a_copy_is_changed_unless_asked_otherwise() -> None:
    net = Residual(False)
    modules, parameters = [id(m) for m in net.modules()], [id(p) for p in net.parameters()]
    changes = batchnorm.insert(net)
    assert changes.model is not net
    assert [id(m) for m in net.modules()] == modules
    assert [id(p) for p in net.parameters()] == parameters
    assert not {id(p) for p in changes.model.parameters()} & set(parameters)
    weight = net.stem.weight
    assert batchnorm.insert(net, inplace=True).model is net
    assert net.stem[0].weight is weight


def test_tracing_leaves_no_trace() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(3, 3), nn.Linear(3, 2)
            self.register_buffer("calls", torch.zeros(()))
            self.seen = 0

        def forward(self, x):
            self.seen += 1
            self.calls += 1
            self.last = torch.relu(self.a(x)) * (1 + torch.rand(1) * random.random())
            return self.out(self.last)

    net = Noisy().eval()
    state, python_state = torch.random.get_rng_state(), random.getstate()
    changes = batchnorm.insert(net, inplace=True)
    assert names(changes) == ["a"]
    assert (net.seen, net.calls.item(), hasattr(net, "last")) == (0, 0, False)
    assert not any(module.training for module in net.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert random.getstate() == python_state


def test_branches_of_training_are_seen_in_eval_too() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x, mask=None):
            x = torch.relu(self.a(x))
            if mask is not None:
                x = self.b(x) * mask
            if self.training:
                x = torch.relu(self.b(x))
            return self.out(x)

    assert names(batchnorm.insert(Auxiliary().eval())) == ["a", "b"]


def test_a_layer_with_a_forward_of_its_own_keeps_its_bias() -> None:
    class Padded(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias * 1.0)

    net = nn.Sequential(Padded(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    changes = batchnorm.insert(net)
    assert changes.model[0][0].bias is not None
    assert "bias kept" in changes.changed[0].note
    changes.model(torch.randn(2, 2, 4, 4))


def test_hooks_of_a_layer_go_on_working() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    shapes = []
    net[0].register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    batchnorm.insert(net, inplace=True)
    shapes.clear()
    net(torch.randn(5, 3))
    assert shapes == [(5, 4)]


def test_a_layer_that_is_the_whole_model() -> None:
    changes = batchnorm.insert(nn.Linear(3, 2))
    assert type(changes.model) is nn.Linear
    assert list(reasons(changes)) == [""]
    assert "(the model itself)" in str(changes)
