"""Forwards that must not be written anew, and values that must not be moved."""

import copy
import random

import pytest
import torch
from surgery_helpers import check_fused as check
from surgery_helpers import names, notes, randomize, reasons
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import batchnorm


class Base(nn.Module):
    """A convolution, two batch norms and what the subclass does with them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)


X = torch.randn(4, 3, 5, 5)


def left(cls: type[nn.Module]) -> str:
    """Why a forward stays as it is; the model computes the same nevertheless."""
    changes = check(cls(), X)
    assert names(changes) == ["bn"]
    assert type(changes.model) is cls
    return notes(changes)["bn"]


def test_a_forward_that_depends_on_the_mode() -> None:
    class Dropping(Base):
        def forward(self, x):
            return F.dropout(F.relu(self.bn(self.conv(x))), 0.5, self.training)

    class Branching(Base):
        def forward(self, x):
            y = self.bn(self.conv(x))
            return F.relu(y) if self.training else F.silu(y)

    assert "another one in training than in evaluation" in left(Dropping)
    assert "followed by different activations" in left(Branching)


def test_a_forward_that_does_more_than_its_graph() -> None:
    class Drawing(Base):
        def forward(self, x):
            return F.relu(self.bn(self.conv(x))) * (1.0 if random.random() < 2 else 0.0)

    class Making(Base):
        def forward(self, x):
            return F.relu(self.bn(self.conv(x))) + torch.ones(5)

    class Keeping(Base):
        def forward(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            return F.relu(self.bn(self.conv(x)))

    class Choosing(Base):
        def forward(self, x, scale=None):
            y = F.relu(self.bn(self.conv(x)))
            return y if scale is None else y * scale

    assert "it draws random numbers" in left(Drawing)
    assert "it makes tensors on the way" in left(Making)
    assert "it changes attributes" in left(Keeping)
    assert "has optional arguments" in left(Choosing)


def test_values_that_are_kept() -> None:
    class Storing(Base):
        def forward(self, x):
            y = self.bn(self.conv(x))
            self.seen = [y]
            return F.relu(y)

    changes = batchnorm.fuse(Storing())
    assert notes(changes)["bn"] == "its output is kept as an attribute"


def test_values_that_change_in_place() -> None:
    class Input(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            x = self.conv(x)
            y = self.bn(x.clone())
            z = x * 2
            return F.relu(y + z)

    class Changed(Base):
        def forward(self, x):
            c = self.conv(x)
            y = self.bn(c)
            c.detach().mul_(2)
            return F.relu(y + x)

    class Into(Base):
        def forward(self, x):
            z = self.conv(x) * 1
            z += self.bn(x * 1)
            return F.relu(z)

    # A clone is no layer's fresh output: anything between could change it.
    assert "other calls, which may change its input in place" in left(Input)
    assert "may change its input in place" in notes(batchnorm.fuse(Changed()))["bn"]
    assert left(Into) == "its output is added in place to another value"


def test_a_batch_norm_that_is_called_again_before_the_addition() -> None:
    class Again(Base):
        def forward(self, x):
            a = self.bn(self.conv(x))
            b = self.bn(self.conv(x * 2))
            return F.relu(b + x) * F.relu(a + x)

    assert left(Again) == "it is called again before the addition"


def test_two_batch_norms_that_are_added() -> None:
    class Both(Base):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.BatchNorm2d(3)

        def forward(self, x):
            return F.relu(self.bn(self.conv(x)) + self.other(self.conv(x * 2)))

    found = notes(check(Both(), X))
    assert found["bn"] == "takes the addition and the activation in the forward of the model"
    assert found["other"] == "BatchNorm2d (bn), to which it is added, takes the addition"


def test_shapes_of_what_is_added() -> None:
    class Smaller(Base):
        def forward(self, x):
            return F.relu(self.bn(self.conv(x)) + x.mean((2, 3), keepdim=True))

    class Larger(Base):
        def forward(self, x):
            return F.relu(self.bn(self.conv(F.adaptive_avg_pool2d(x, 1))) + x)

    class Unseen(Base):
        def forward(self, x):
            return F.relu(self.bn(self.conv(x[:, :, :1, :1])) + x)

    class Number(Base):
        def forward(self, x):
            return F.relu(1 + self.bn(self.conv(x)))

    class Shape(Base):
        def forward(self, x):
            y = self.bn(self.conv(x))
            return F.relu(y + x.reshape(y.shape)).reshape(y.shape[0], -1)

    class Scaled(Base):
        def forward(self, x):
            return F.relu(torch.add(self.bn(self.conv(x)), x, alpha=2))

    assert "more than add two values" in left(Scaled)
    found = notes(check(Smaller(), X))
    assert found["bn"] == "takes the addition and the activation in the forward of the model"
    assert "pooled" in left(Larger)
    assert left(Number) == "a number is added to its output"
    with pytest.raises(batchnorm.InputError, match=r"batchnorm\.fuse took into a batch norm"):
        batchnorm.fuse(Unseen()).model(X)
    assert "takes the addition" in notes(check(Shape(), X))["bn"]


class Inverted(nn.Module):
    """The batch norm in a sequence, the addition outside."""

    def __init__(self, cls: type[nn.Sequential] = nn.Sequential) -> None:
        super().__init__()
        self.body = cls(
            nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU6(), cls(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3))
        )

    def forward(self, x):
        return x + self.body(x)


class Named(nn.Sequential):
    """It does what nn.Sequential does, in code of its own."""

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


def test_an_addition_outside_of_the_sequence() -> None:
    found = notes(check(nn.Sequential(Inverted(), nn.Conv2d(3, 1, 1)), X))
    assert found["0.body.3.1"] == "takes the addition in the forward of 0"
    assert found["0.body.1"] == "takes its activation"
    found = notes(check(Inverted(Named), X))
    assert "stands in the forward of Named (body)" in found["body.3.1"]
    hooked = Inverted()
    hooked.body.register_forward_hook(lambda module, args, out: out * 2)
    assert "passes a hook" in notes(check(hooked, X))["body.3.1"]


def test_an_activation_behind_a_hooked_sequence() -> None:
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), nn.ReLU())
    net[0].register_forward_hook(lambda module, args, out: out + 1)
    changes = check(net, X)
    assert notes(changes) == {"0.1": "its output passes a hook of the module that it stands in"}


class Values(nn.Module):
    """It cannot be followed as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU())
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.stem(x)
        return F.relu(self.bn(y)) if y.sum() > -1e9 else y


def test_parts_of_a_forward_that_cannot_be_followed() -> None:
    changes = check(Values(), X)
    assert notes(changes) == {
        "stem.1": "takes its activation",
        "stem.2": "the batch norm before it does it",
        "bn": "no forward that could be traced calls it",
    }
    assert changes.notes[0].endswith("taken each by itself: stem")


def test_what_is_skipped() -> None:
    class Own(nn.BatchNorm2d):
        pass

    net = nn.Sequential(Own(3), nn.SyncBatchNorm(3), nn.LazyBatchNorm2d(), nn.BatchNorm2d(3))
    parametrizations.orthogonal(nn.Linear(2, 2))
    torch.nn.utils.parametrize.register_parametrization(net[3], "weight", nn.Identity())
    found = reasons(batchnorm.fuse(net))
    assert found == {
        "0": "Own is a class of its own, which may do more than normalize",
        "1": "it is synchronized: its statistics are those of all processes",
        "2": "its shape is not known yet: run one batch through the model first",
        "3": "its parameters are computed from others (a parametrization)",
    }


def test_nothing_changes_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    net = randomize(Inverted())
    types = [type(module) for module in net.modules()]

    def fail(module: nn.Module) -> str:
        if isinstance(module, nn.Identity):
            raise RuntimeError("on purpose")
        return ""

    # The last thing that happens to a model: what it has become is told.
    monkeypatch.setattr("batchnorm._walk.plan.short", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        batchnorm.fuse(net, inplace=True)
    assert [type(module) for module in net.modules()] == types
    assert "activation" not in vars(net.body[1])


def test_a_forward_that_reads_the_kind_of_its_layers() -> None:
    class Asking(Base):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            y = self.bn(self.conv(x))
            return self.act(y) if isinstance(self.act, nn.ReLU) else y * 0

    net = randomize(Asking())
    changes = batchnorm.fuse(net)
    torch.testing.assert_close(changes.model(X), copy.deepcopy(net)(X))
    assert isinstance(changes.model.act, nn.ReLU)


def test_autocast_and_half_types() -> None:
    net = randomize(nn.Sequential(Inverted(), nn.BatchNorm2d(3), nn.ReLU()))
    fused = batchnorm.fuse(net).model
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused(X).float(), net(X).float(), rtol=0.05, atol=0.05)
    half, fused = copy.deepcopy(net).bfloat16(), fused.bfloat16()
    torch.testing.assert_close(fused(X.bfloat16()), half(X.bfloat16()), rtol=0.05, atol=0.05)


def test_wrapped_models_and_graphs() -> None:
    class Model(nn.Sequential):
        pass

    def made() -> nn.Module:
        return randomize(Model(Inverted(), nn.BatchNorm2d(3), nn.ReLU()))

    wrapped = nn.DataParallel(made())
    changes = batchnorm.fuse(wrapped)
    assert notes(changes)["module.0.body.3.1"] == "takes the addition in the forward of module.0"
    assert notes(changes)["module.1"] == "takes its activation"
    torch.testing.assert_close(changes.model(X), copy.deepcopy(wrapped)(X))
    compiled = torch.compile(made(), backend="eager")
    changes = batchnorm.fuse(compiled)
    assert notes(changes)["_orig_mod.0.body.3.1"] == "takes the addition in the forward of _orig_mod.0"
    torch.testing.assert_close(changes.model(X), compiled(X))
    graph = torch.fx.symbolic_trace(made())
    changes = batchnorm.fuse(graph)
    found = notes(changes)
    assert found["0.body.3.1"] == "its forward is a graph, which makes its own code"
    assert found["1"] == "takes its activation"
    torch.testing.assert_close(copy.deepcopy(changes.model)(X), copy.deepcopy(graph)(X))


def tracked(model: nn.Module) -> list[torch.Tensor | None]:
    """Output and gradients of a training step; None where there is none, and for all if the output has none."""
    x = X.clone().requires_grad_()
    y = model.train()(x)
    if y.requires_grad:
        y.square().sum().backward()
    found = [y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]
    model.zero_grad()
    return found


def same_gradients(model: nn.Module) -> batchnorm.Changes:
    """What `fuse` does to a model, which computes the same and tracks the same afterwards."""
    changes = batchnorm.fuse(randomize(model))
    for actual, wanted in zip(tracked(changes.model), tracked(model), strict=True):
        assert (actual is None) == (wanted is None)
        if actual is not None:
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    return changes


def stays(cls: type[nn.Module]) -> str:
    """Why a forward stays as it is."""
    changes = same_gradients(cls())
    assert type(changes.model) is cls
    return notes(changes)["bn"]


def test_blocks_that_a_graph_does_not_show() -> None:
    class Untracked(Base):
        def forward(self, x):
            with torch.no_grad():
                y = self.conv(x)
            return F.relu(self.bn(y))

    class Decorated(Base):
        @torch.no_grad()
        def forward(self, x):
            return F.relu(self.bn(self.conv(x)))

    class Switching(Base):
        def forward(self, x):
            torch.set_grad_enabled(False)
            y = self.conv(x)
            torch.set_grad_enabled(True)
            return F.relu(self.bn(y))

    class Helped(Base):
        def forward(self, x):
            return F.relu(self.bn(self.precise(x)))

        def precise(self, x):
            with torch.autocast("cpu", enabled=False):
                return self.conv(x)

    class Own(Base):
        def forward(self, x):
            with torch.profiler.record_function("block"):
                return F.relu(self.bn(self.conv(x)))

    class Checkpointed(Base):
        def forward(self, x):
            y = torch.utils.checkpoint.checkpoint(self.conv, x, use_reentrant=False)
            return F.relu(self.bn(y))

    assert "forward has a `with` block" in stays(Untracked)
    assert "runs without gradients" in stays(Decorated)
    assert "runs without gradients" in stays(Switching)
    assert "precise has a `with` block" in stays(Helped)
    assert "forward has a `with` block" in stays(Own)
    assert "hooks that it sets itself" in stays(Checkpointed)


@pytest.mark.parametrize("where", ["activation", "convolution"])
def test_a_block_around_a_part_of_what_is_fused(where: str) -> None:
    """Layers alone change here, no forward."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.act = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU()

        def forward(self, x):
            with torch.set_grad_enabled(where == "activation"):
                y = self.conv(x)
            y = self.bn(y)
            with torch.set_grad_enabled(where != "activation"):
                return self.act(y)

    changes = same_gradients(Layers())
    if where == "activation":
        assert notes(changes) == {"bn": "ReLU (act) behind it runs in another block"}
    else:
        assert names(changes) == ["bn", "act"]


def test_fused_under_no_grad() -> None:
    """The block around the call of `fuse` is not the forward's."""

    class Block(Base):
        def forward(self, x):
            return F.relu(self.bn(self.conv(x)))

    with torch.no_grad():
        changes = batchnorm.fuse(Block())
    assert "takes the activation" in notes(changes)["bn"]
    changes.model(X).sum().backward()
    assert changes.model.conv.weight.grad is not None
