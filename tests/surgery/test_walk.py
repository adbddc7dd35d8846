import json
from collections import OrderedDict

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm._walk import Plan, hooks_of, prepared, short, walk


class Twice(nn.Module):
    """One block under two names, a shared layer inside it, and itself as a child of a child."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.ReLU()
        self.first = nn.Sequential(nn.Linear(2, 2), shared)
        self.second = self.first
        self.act = shared
        self.empty = None
        self.register_module("none", None)


def test_every_module_once_with_all_its_names_and_places() -> None:
    net = Twice()
    spots = walk(net)
    assert [spot.module for spot in spots] == list(net.modules())
    assert [spot.name for spot in spots] == [name for name, _ in net.named_modules()]
    names = {name: module for spot in spots for name in spot.names for module in [spot.module]}
    assert names == dict(net.named_modules(remove_duplicate=False))
    relu = next(spot for spot in spots if spot.module is net.act)
    assert relu.names == ("first.1", "second.1", "act")
    assert [(owner is net.first, key) for owner, key in relu.places] == [(True, "1"), (False, "act")]
    assert spots[0].names == ("",)
    assert spots[0].places == ()


def test_a_module_that_contains_itself_is_walked() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    net._modules["self"] = net
    assert [spot.module for spot in walk(net)] == [net, net[0]]


def test_replacing_a_shared_module_keeps_it_shared() -> None:
    net = Twice()
    plan = Plan("test", net)
    new = nn.Tanh()
    plan.replace(next(spot for spot in plan.spots if spot.module is net.act), new)
    assert isinstance(net.act, nn.ReLU)
    changes = plan.apply()
    assert net.act is net.first[1] is net.second[1] is new
    assert changes.changed[0].also == ("second.1", "act")
    changes.revert()
    assert isinstance(net.act, nn.ReLU)
    assert net.act is net.first[1] is net.second[1]


class Stubborn(OrderedDict):
    """A table of children that can be told to refuse."""

    refuses = ""

    def __setitem__(self, key, value):
        if key == self.refuses and isinstance(value, nn.Identity):
            raise RuntimeError("refused")
        super().__setitem__(key, value)


def test_a_failure_half_way_leaves_nothing_changed() -> None:
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = list(net)
    net._modules = Stubborn(net._modules)
    net._modules.refuses = "3"
    with pytest.raises(RuntimeError, match="refused"):
        batchnorm.remove(net, inplace=True)
    assert all(a is b for a, b in zip(net, before, strict=True))
    assert net[0].bias is None


@pytest.mark.parametrize("training", [True, False])
def test_revert_brings_back_the_very_objects(training: bool) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3))
    net.train(training)
    net[1].training = not training
    modules = [id(module) for module in net.modules()]
    tensors = {name: id(value) for name, value in [*net.named_parameters(), *net.named_buffers()]}
    state = {name: value.clone() for name, value in net.state_dict().items()}
    flags = [module.training for module in net.modules()]

    changes = batchnorm.remove(net, inplace=True)
    assert changes.model is net
    assert [id(module) for module in net.modules()] != modules
    assert changes.revert() is net
    assert [id(module) for module in net.modules()] == modules
    assert {name: id(value) for name, value in [*net.named_parameters(), *net.named_buffers()]} == tensors
    assert [module.training for module in net.modules()] == flags
    assert list(net.state_dict()) == list(state)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in state.items())
    assert changes.revert() is net


def test_revert_leaves_everything_in_the_mode_of_now() -> None:
    """What comes back is put where its replacement is; what stayed in the model, one frozen by hand, is not touched."""
    net = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3), nn.Tanh()), nn.BatchNorm1d(3))
    bn, block, last = net[1][0], net[1], net[2]
    for mode in (False, True):
        changes = batchnorm.remove(net, inplace=True)
        net.train(mode)
        net[2].train(not mode)
        changes.revert()
        assert (net[1], net[1][0], net[2]) == (block, bn, last)
        assert [bn.training, last.training, block.training, net.training] == [mode, not mode, mode, mode]
    wrapped = batchnorm.insert(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
    wrapped.model.eval()
    wrapped.model[0][0].train()  # a layer that stands inside of its replacement
    assert [m.training for m in wrapped.revert()] == [True, False, False]
    alone = batchnorm.remove(nn.BatchNorm1d(3))
    alone.model.eval()
    assert not alone.revert().training


def test_revert_in_the_wrong_order_is_refused_and_the_right_order_works() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3))
    original = list(net)
    first = batchnorm.remove(net, inplace=True)
    second = batchnorm.insert(net, inplace=True)
    state = list(net)
    with pytest.raises(batchnorm.ModelError, match="Revert the later change first"):
        first.revert()
    assert all(a is b for a, b in zip(net, state, strict=True))
    second.revert()
    first.revert()
    assert all(a is b for a, b in zip(net, original, strict=True))
    assert net[0].bias is None


def test_revert_refuses_a_place_that_holds_something_else_now() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    changes = batchnorm.remove(net, inplace=True)
    stranger = net[1] = nn.Identity()
    with pytest.raises(batchnorm.ModelError, match="something else has changed"):
        changes.revert()
    assert net[1] is stranger
    assert type(net[0]) is nn.Identity


def test_the_report_in_all_its_forms(tmp_path) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    net.register_module("a<b", nn.Identity())
    changes = batchnorm.insert(net)
    report = json.loads(changes.to_json())
    assert report["schema_version"] == 1
    assert report["kind"] == "changes"
    assert report["operation"] == "insert"
    assert report["changed"] == [
        {
            "name": "0",
            "also": [],
            "before": "Linear(2, 3)",
            "after": "Sequential(Linear(2, 3, bias=False), batchnorm.BatchNorm1d(3))",
            "note": "before ReLU (1); its bias dropped",
            "only_class": False,
        }
    ]
    assert report["skipped"] == [{"name": "2", "also": [], "reason": "its output is the model's output"}]
    assert str(changes).splitlines()[0] == "insert: 1 changed, 1 skipped"
    assert "  2: its output is the model's output" in str(changes).splitlines()
    assert "Sequential(Linear(2, 3, bias=False), batchnorm.BatchNorm1d(3))" in changes._repr_html_()

    assert json.loads(changes.save(tmp_path / "a.json").read_text()) == report
    assert "</html>" in changes.save(tmp_path / "a.html").read_text()
    assert changes.save(tmp_path / "a.txt").read_text() == f"{changes}\n"
    with pytest.raises(batchnorm.OutputError):
        changes.save(tmp_path / "nowhere" / "a.json")


def test_the_report_escapes_what_a_model_prints() -> None:
    class Rude(nn.BatchNorm1d):
        def extra_repr(self) -> str:
            return "<script>"

    html = batchnorm.remove(nn.Sequential(Rude(2)))._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


class Own(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.BatchNorm2d(64), "torch.nn.BatchNorm2d(64)"),
        (batchnorm.BatchNorm2d(64), "batchnorm.BatchNorm2d(64)"),
        (
            batchnorm.BatchNorm1d(3, 1e-3, None, activation="relu", nonfinite="skip"),
            "batchnorm.BatchNorm1d(3, eps=0.001, momentum=None, activation='relu', nonfinite='skip')",
        ),
        (nn.BatchNorm1d(3, affine=False), "torch.nn.BatchNorm1d(3, affine=False)"),
        (batchnorm.BatchNorm1d(3, bias=False), "batchnorm.BatchNorm1d(3, bias=False)"),
        (nn.LazyBatchNorm2d(), "torch.nn.LazyBatchNorm2d()"),
        (nn.SyncBatchNorm(4), "torch.nn.SyncBatchNorm(4)"),
        (batchnorm.freeze(nn.BatchNorm2d(3)).model, "FrozenBatchNorm2d(3)"),
        (
            nn.Conv2d(3, 8, 3, stride=2, padding=(1, 2), bias=False),
            "Conv2d(3, 8, 3, stride=2, padding=(1, 2), bias=False)",
        ),
        (nn.Conv1d(3, 8, 3, groups=1), "Conv1d(3, 8, 3)"),
        (nn.Linear(3, 8), "Linear(3, 8)"),
        (nn.ReLU(inplace=True), "ReLU(inplace=True)"),
        (nn.Sequential(nn.ReLU(), nn.Tanh()), "Sequential(ReLU(), Tanh())"),
        (nn.Sequential(*[nn.ReLU()] * 4), "Sequential(4 modules)"),
        (Block(), "Block"),
        (Own(), "Own(in_features=2, out_features=2, bias=True)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_module_in_a_few_words(module: nn.Module, text: str) -> None:
    assert short(module) == text


def test_no_line_is_long() -> None:
    class Talkative(nn.BatchNorm2d):
        def extra_repr(self) -> str:
            return "and so on, " * 100

    (change,) = batchnorm.remove(nn.Sequential(Talkative(3))).changed
    assert change.before == f"Talkative({('and so on, ' * 10)[:79]}…)"


def test_what_does_not_show_is_not_told_twice() -> None:
    changes = batchnorm.freeze(nn.Sequential(nn.BatchNorm2d(3)), statistics=False)
    assert str(changes).splitlines()[1] == "  0: torch.nn.BatchNorm2d(3) (weight, bias frozen)"


def test_another_class_alone_is_counted_apart() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    )
    changes = batchnorm.fuse(net)
    assert [change.only_class for change in changes.changed] == [False, False, True]
    lines = str(changes).splitlines()
    assert lines[0] == "fuse: 2 changed, 1 only given another class, 0 skipped"
    assert lines[3] == (
        "  4: torch.nn.BatchNorm2d(4) -> batchnorm.BatchNorm2d(4) (only its class: the model's output follows it)"
    )
    assert "only its class: the model" in changes._repr_html_()
    assert str(batchnorm.convert(net, "batchnorm")).splitlines()[0] == "convert: 2 changed, 0 skipped"


@pytest.mark.parametrize(
    "operation",
    [
        batchnorm.remove,
        batchnorm.fuse,
        batchnorm.fold,
        batchnorm.freeze,
        batchnorm.unfreeze,
        batchnorm.absorb_bias,
        lambda model: batchnorm.convert(model, "torch"),
    ],
)
def test_nothing_found_is_told(operation) -> None:
    assert operation(nn.Linear(2, 2).eval()).notes == ("the model has no batch norm",)


def test_nothing_to_do_is_told() -> None:
    assert batchnorm.unfreeze(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))).notes == (
        "nothing to do: 2 batch norms in the model, all as wanted",
    )
    assert batchnorm.insert(nn.ReLU()).notes == ("the model has no layer that batch norm could follow",)


def test_hooks_are_found() -> None:
    layer = nn.BatchNorm1d(2)
    assert hooks_of(layer) == []
    layer.register_forward_hook(lambda *_: None)
    layer.register_full_backward_hook(lambda *_: None)
    layer.register_state_dict_post_hook(lambda *_: None)
    assert hooks_of(layer) == ["forward hook", "backward hook", "state_dict hook"]


def test_a_model_that_cannot_be_copied_can_be_changed_in_place() -> None:
    class Held(nn.Sequential):
        def __deepcopy__(self, memo):
            raise TypeError("holds a socket")

    net = Held(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(batchnorm.ModelError, match=r"holds a socket.*inplace=True"):
        batchnorm.remove(net)
    assert isinstance(batchnorm.remove(net, inplace=True).model[1], nn.Identity)


@pytest.mark.parametrize("operation", [batchnorm.insert, batchnorm.remove])
def test_what_is_no_module_is_refused(operation) -> None:
    with pytest.raises(batchnorm.InputTypeError, match=r"got list, expected a torch\.nn.Module"):
        operation([nn.Linear(2, 2)])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_and_distributed_models_are_refused() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(batchnorm.ModelError, match="before scripting"):
        batchnorm.insert(nn.Sequential(scripted))

    class Wrapped(nn.Module):
        pass

    Wrapped.__module__ = nn.parallel.DistributedDataParallel.__module__
    with pytest.raises(batchnorm.ModelError, match="wrap it then"):
        prepared(Wrapped(), operation="insert", inplace=True)
