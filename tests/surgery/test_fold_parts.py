"""Folding where the forward cannot be followed as a whole, and folding that is checked on an example."""

import collections
import dataclasses

import pytest
import torch
from surgery_helpers import names, randomize, reasons
from torch import nn

import batchnorm
from batchnorm.surgery import _folding


class Branching(nn.Module):
    """A forward that looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.conv = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.features(x)
        return self.bn(self.conv(x)) if x.sum() > 0 else x


def test_parts_of_a_forward_that_cannot_be_followed() -> None:
    net = randomize(Branching()).double().eval()
    x = torch.randn(2, 3, 5, 5).double()
    changes = batchnorm.fold(net)
    assert names(changes) == ["features.1"]
    assert reasons(changes) == {"bn": "no forward that could be traced calls it"}
    (note,) = changes.notes
    assert note.startswith("the forward could not be traced (TraceError: ")
    assert note.endswith(
        "by itself: features; pass an example to check that nothing outside reaches into them"
    )
    torch.testing.assert_close(changes.model(x), net(x))
    checked = batchnorm.fold(net, x)
    assert "pass an example" not in checked.notes[0]
    assert checked.notes[1].startswith("on the example, output: max abs error")


class Reaching(Branching):
    """It also reads what is inside of its parts."""

    def forward(self, x):
        y = self.features[0](x)
        return self.features(x) + y if x.sum() > -1e9 else x


def test_an_example_finds_out_who_reaches_into_a_part() -> None:
    net = randomize(Reaching()).eval()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(batchnorm.ModelError, match="Nothing was changed"):
        batchnorm.fold(net, torch.randn(2, 3, 5, 5), inplace=True)
    assert isinstance(net.features[1], nn.BatchNorm2d)
    assert list(net.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_a_layer_that_is_used_outside_of_its_part_stays() -> None:
    net = randomize(Branching()).eval()
    net.again = net.features[1]
    net.conv = net.features[0]
    assert "used outside of features" in reasons(batchnorm.fold(net))["features.1"]
    del net.again
    assert (
        "Conv2d (features.0) stands next to it: it is used outside"
        in reasons(batchnorm.fold(net))["features.1"]
    )


class Optional(nn.Module):
    """A block with an argument that it can do without."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x, shift=None):
        y = self.conv(x)
        return self.bn(y if shift is None else y + shift)


class Calling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Optional()

    def forward(self, x):
        return self.block(x, x) if x.sum() > -1e9 else x


def test_optional_arguments() -> None:
    net, x = randomize(Optional()).double().eval(), torch.randn(2, 3, 4, 4).double()
    changes = batchnorm.fold(net)
    assert changes.notes == ("traced with these arguments at their defaults: shift",)
    torch.testing.assert_close(changes.model(x), net(x))
    for example in ((x, x), {"x": x, "shift": x}):
        assert "add comes before it" in reasons(batchnorm.fold(net, example))["bn"]
    assert names(batchnorm.fold(net, (x,))) == ["bn"]
    assert names(batchnorm.fold(net, {"x": x, "shift": None})) == ["bn"]
    # As a part, it may be called with the argument by what cannot be followed.
    calling = randomize(Calling()).double().eval()
    assert not batchnorm.fold(calling).changed


Point = collections.namedtuple("Point", "x y")


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]


class Many(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    def forward(self, x):
        y = self.net(x)
        return {
            "dict": {"a": y, "b": [x, y.argmax(1)]},
            "named": Point(y, x),
            "data": Output(y, (x, y)),
            "nothing": None,
        }[self.kind]


def test_every_output_is_compared() -> None:
    x = torch.randn(4, 3)

    def lines(kind: str) -> list[str]:
        changes = batchnorm.fold(randomize(Many(kind)).eval(), x)
        return [note.removeprefix("on the example, ").split(":")[0] for note in changes.notes]

    assert lines("dict") == ["output['a']", "output['b'][0]", "output['b'][1]"]
    assert lines("named") == ["output[0]", "output[1]"]
    with pytest.raises(batchnorm.ModelError, match="without a tensor among its outputs"):
        lines("nothing")


def test_a_wrong_fold_is_found_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    original = _folding.Folded.then

    def wrong(self, norm):
        new = original(self, norm)
        new.bias = new.bias + 1e-2
        return new

    monkeypatch.setattr(_folding.Folded, "then", wrong)
    net = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    conv, norm, weight = *net, net[0].weight
    with pytest.raises(batchnorm.ModelError, match=r"bound 0\.00035"):
        batchnorm.fold(net, torch.randn(2, 3, 5, 5), inplace=True)
    assert (net[0] is conv, net[1] is norm, net[0].weight is weight) == (True, True, True)


def test_an_example_that_does_not_run() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    for example in (torch.randn(2, 4, 5, 5), (), {"x": 1}, "text"):
        with pytest.raises(batchnorm.ModelError, match="fold: model on the example"):
            batchnorm.fold(net, example)


def test_the_example_leaves_no_trace() -> None:
    net = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    net.append(nn.BatchNorm2d(4).train())
    state = {key: value.clone() for key, value in net.state_dict().items()}
    x = torch.randn(2, 3, 5, 5)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    batchnorm.fold(net, x)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_infinities_and_nans_have_to_stay_where_they_are() -> None:
    net = randomize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).eval()
    x = torch.randn(2, 3, 5, 5)
    x[0, 0, 0, 0] = float("nan")
    assert names(batchnorm.fold(net, x)) == ["1"]
    before, after = [("output", torch.tensor([1.0, float("nan")]))], [("output", torch.tensor([1.0, 2.0]))]
    from batchnorm.surgery._verify import differences

    for first, second in ((before, after), (after, before)):
        with pytest.raises(batchnorm.ModelError, match="max abs error inf"):
            differences(first, second, "fold")
    with pytest.raises(batchnorm.ModelError, match="another form"):
        differences(before, [("output", torch.tensor([1.0]))], "fold")


class Choosing(nn.Module):
    """Calls a layer only if it is one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.scale = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        if isinstance(self.bn, nn.BatchNorm2d):
            x = self.bn(x)
        return x * self.bn.num_features


def test_a_forward_that_depends_on_the_layer() -> None:
    found = reasons(batchnorm.fold(Choosing().eval()))
    assert "the model reads its attribute 'num_features'" in found["bn"]


def test_nothing_to_fold() -> None:
    for net in (nn.Linear(3, 3), nn.BatchNorm2d(3), nn.Sequential()):
        assert not batchnorm.fold(net.eval()).changed
    with pytest.raises(batchnorm.InputTypeError):
        batchnorm.fold(3)
