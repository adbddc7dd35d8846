import copy

import pytest
import torch
from surgery_helpers import names, randomize, reasons
from torch import nn

import batchnorm
from batchnorm.nn.families import FAMILIES, Family, register

X = torch.randn(8, 3, 5, 5)
OURS = {1: batchnorm.BatchNorm1d, 2: batchnorm.BatchNorm2d, 3: batchnorm.BatchNorm3d}
TORCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 0.1, "momentum": None}])
def test_there_and_back(axes: int, options: dict[str, object]) -> None:
    layer = randomize(TORCH[axes](3, **options))
    before, attributes, x = copy.deepcopy(layer), dict(vars(layer)), torch.randn(4, 3, *[5] * axes)
    objects = [*layer.parameters(), *layer.buffers()]
    changes = batchnorm.convert(layer, "batchnorm", inplace=True)
    assert changes.model is layer
    assert type(layer) is OURS[axes]
    torch.testing.assert_close(layer(x), before(x))
    torch.testing.assert_close(layer.state_dict(), before.state_dict())
    back = batchnorm.convert(layer, "torch", inplace=True)
    assert type(layer) is TORCH[axes]
    assert vars(layer).keys() == attributes.keys()
    assert [vars(layer)[key] for key in ("eps", "momentum", "num_features")] == [
        attributes[key] for key in ("eps", "momentum", "num_features")
    ]
    assert all(a is b for a, b in zip(objects, [*layer.parameters(), *layer.buffers()], strict=True))
    back.revert()
    assert type(layer) is OURS[axes]
    changes.revert()
    assert type(layer) is TORCH[axes]
    assert vars(layer).keys() == attributes.keys()


def test_sharing_hooks_mode_and_identity_stay() -> None:
    norm = nn.BatchNorm2d(3)
    seen: list[type] = []
    handle = norm.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    norm.eval()
    norm.tag = "mine"
    model = nn.Sequential(norm, nn.Sequential(norm))
    batchnorm.convert(model, nn.SyncBatchNorm, inplace=True, process_group="group")
    assert model[0] is model[1][0] is norm
    assert (type(norm), norm.process_group, norm.tag, norm.training) == (
        nn.SyncBatchNorm,
        "group",
        "mine",
        False,
    )
    model(X)
    assert seen == [nn.SyncBatchNorm] * 2
    handle.remove()
    model(X)
    assert len(seen) == 2
    batchnorm.convert(model, nn.BatchNorm2d, inplace=True)
    assert type(norm) is nn.BatchNorm2d
    assert "process_group" not in vars(norm)


def test_options() -> None:
    model = batchnorm.convert(net(), batchnorm.BatchNorm2d, nonfinite="skip", eps=0.5, backend="aten").model
    assert [model[1].nonfinite, model[1].eps, model[1].backend, model[1].momentum] == [
        "skip",
        0.5,
        "aten",
        0.1,
    ]
    again = batchnorm.convert(model, "batchnorm", eps=0.25)
    assert [again.model[1].nonfinite, again.model[1].eps] == ["skip", 0.25]
    assert batchnorm.convert(model, "batchnorm").changed == ()
    assert again.revert()[1].eps == 0.5
    for options, error in (
        ({"colour": 1}, batchnorm.InputError),
        ({"nonfinite": "sometimes"}, batchnorm.InputError),
        ({"affine": False}, batchnorm.InputError),
        ({"num_features": 3}, batchnorm.InputError),
    ):
        with pytest.raises(error):
            batchnorm.convert(model, "batchnorm", **options)


def test_targets() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(3))
    changes = batchnorm.convert(model, batchnorm.BatchNorm2d)
    assert names(changes) == ["1"]
    assert "another number of axes" in reasons(changes)["0"]
    for wrong in ("bn", nn.Linear, batchnorm.LazyBatchNorm1d):
        with pytest.raises(
            batchnorm.InputError, match=r"one of 'batchnorm', .*'ghost', .*'torch', 'torch-sync'"
        ):
            batchnorm.convert(model, wrong)
    with pytest.raises(batchnorm.InputTypeError):
        batchnorm.convert(model, 3)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"momentum": 2}, batchnorm.InputError, "momentum: got 2, expected a number from 0 to 1, or None"),
        ({"momentum": float("nan")}, batchnorm.InputError, "momentum: got nan"),
        ({"momentum": "0.1"}, batchnorm.InputTypeError, "momentum: got str"),
        ({"eps": -1}, batchnorm.InputError, "eps: got -1, expected a number above 0"),
        ({"eps": 0}, batchnorm.InputError, "eps: got 0"),
        ({"eps": float("inf")}, batchnorm.InputError, "eps: got inf"),
        ({"eps": None}, batchnorm.InputTypeError, "eps: got NoneType"),
    ],
)
@pytest.mark.parametrize("to", ["torch", "batchnorm", "torch-sync"])
def test_numbers_that_no_layer_can_work_with(to: str, options, error, text: str) -> None:
    model = net()
    with pytest.raises(error, match=f"convert: {text}"):
        batchnorm.convert(model, to, inplace=True, **options)
    assert type(model[1]) is nn.BatchNorm2d
    for momentum in (0, 1, 0.5, None):
        assert batchnorm.convert(model, to, momentum=momentum).model[1].momentum == momentum


@pytest.mark.parametrize("start", ["torch", "batchnorm"])
def test_back_from_synchronized_by_the_name(start: str) -> None:
    """What was converted remembers its axes, also where no graph tells them."""
    classes = TORCH if start == "torch" else OURS
    model = nn.ModuleList([classes[axes](3) for axes in (1, 2, 3)])
    attributes = [vars(layer).keys() for layer in copy.deepcopy(model)]
    batchnorm.convert(model, "torch-sync", inplace=True)
    assert {type(layer) for layer in model} == {nn.SyncBatchNorm}
    wrong = batchnorm.convert(model, nn.BatchNorm1d)
    assert names(wrong) == ["0"]
    assert "another number of axes" in reasons(wrong)["1"]
    loaded = copy.deepcopy(model)
    for each in (model, loaded):
        changes = batchnorm.convert(each, start, inplace=True)
        assert not changes.skipped
        assert [type(layer) for layer in each] == list(classes.values())
        assert [vars(layer).keys() for layer in each] == attributes


@pytest.mark.parametrize("start", ["torch", "batchnorm"])
def test_through_our_synchronized_layers_and_pytorchs(start: str) -> None:
    """One class for every number of axes, with a group and without; a layer knows where it came from."""
    classes = TORCH if start == "torch" else OURS
    model = nn.ModuleList([randomize(classes[axes](3, eps=0.1, momentum=None)) for axes in (1, 2, 3)])
    attributes = [vars(layer).keys() for layer in copy.deepcopy(model)]
    state = copy.deepcopy(model.state_dict())
    for to, cls in (("sync", batchnorm.SyncBatchNorm), ("torch-sync", nn.SyncBatchNorm), ("sync", None)):
        changes = batchnorm.convert(model, to, inplace=True)
        assert not changes.skipped
        assert {type(layer) for layer in model} == {cls or batchnorm.SyncBatchNorm}
        assert {(layer.process_group, layer.eps, layer.momentum) for layer in model} == {(None, 0.1, None)}
    assert "another number of axes" in reasons(batchnorm.convert(model, nn.BatchNorm1d))["2"]
    for layer, axes in zip(model, (1, 2, 3), strict=True):
        layer(torch.randn(4, 3, *[5] * axes))
    model.load_state_dict(state)
    assert not batchnorm.convert(model, start, inplace=True).skipped
    assert [type(layer) for layer in model] == list(classes.values())
    assert [vars(layer).keys() for layer in model] == attributes
    torch.testing.assert_close(model.state_dict(), state)


def test_a_synchronized_layer_keeps_its_activation() -> None:
    model = nn.Sequential(batchnorm.BatchNorm2d(3, activation="relu", nonfinite="skip", single="zero"))
    synced = batchnorm.convert(model, batchnorm.SyncBatchNorm)
    assert type(synced.model[0]) is batchnorm.SyncBatchNorm
    assert (synced.model[0].activation, synced.model[0].nonfinite, synced.model[0].single) == (
        "relu",
        "skip",
        "zero",
    )
    torch.testing.assert_close(synced.model(X), model(X))
    assert "activation 'relu'" in reasons(batchnorm.convert(synced.model, "torch-sync"))["0"]
    back = batchnorm.convert(synced.model, "batchnorm").model
    assert (type(back[0]), back[0].activation) == (batchnorm.BatchNorm2d, "relu")
    with pytest.raises(batchnorm.InputError, match="options of SyncBatchNorm: got process_group: got str"):
        batchnorm.convert(model, "sync", process_group="all")
    with pytest.raises(batchnorm.InputError, match="got 'group'"):
        batchnorm.convert(model, "sync", group=None)


def test_axes_that_the_graph_tells() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.SyncBatchNorm(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 5),
        nn.SyncBatchNorm(5),
    )
    for to, found in (("torch", TORCH), ("batchnorm", OURS)):
        changed = batchnorm.convert(model, to).model
        assert [type(changed[1]), type(changed[5])] == [found[2], found[1]]
        torch.testing.assert_close(changed.eval()(X), model.eval()(X))
    unknown = batchnorm.convert(nn.Sequential(nn.SyncBatchNorm(3)), "torch")
    assert reasons(unknown) == {
        "0": "SyncBatchNorm does not say for how many axes it is, and no convolution before it does: name the class to "
        "convert to, one of BatchNorm1d, BatchNorm2d, BatchNorm3d"
    }
    shared = nn.SyncBatchNorm(3)
    both = nn.Sequential(nn.Conv2d(3, 3, 3), shared, nn.Flatten(2), nn.Conv1d(3, 3, 1), shared)
    assert names(batchnorm.convert(both, "torch")) == []


def test_dry_run() -> None:
    for inplace in (False, True):
        model = net()
        changes = batchnorm.convert(model, "batchnorm", dry_run=True, inplace=inplace)
        assert names(changes) == ["1"]
        assert changes.model is model
        assert type(model[1]) is nn.BatchNorm2d
        assert "__module__" not in vars(model[1])
        assert changes.revert() is model
        assert str(changes).startswith("convert (dry run, nothing was changed): 1 changed")
        assert '"dry_run": true' in changes.to_json()
    done = batchnorm.convert(net(), "batchnorm")
    assert repr(done) == "Changes(convert: 1 changed, 0 skipped)"
    assert '"dry_run": false' in done.to_json()


def test_an_option_that_is_misspelled() -> None:
    known = "expected one of eps, momentum, activation, negative_slope, nonfinite, single, backend$"
    with pytest.raises(batchnorm.InputError, match=rf"option of BatchNorm\dd: got 'nonfinit', {known}"):
        batchnorm.convert(net(), "batchnorm", nonfinit="skip")
    with pytest.raises(batchnorm.InputError, match=r"got 'nonfinite', expected one of eps, momentum$"):
        batchnorm.convert(net(), "torch", nonfinite="skip")


def test_an_activation_for_every_layer_is_told() -> None:
    changes = batchnorm.convert(net(), "batchnorm", activation="relu")
    assert changes.model[1].activation == "relu"
    assert "every converted layer does 'relu' now" in changes.notes[0]
    assert not batchnorm.convert(net(), "batchnorm", activation=None).notes


def test_lazy_layers() -> None:
    model = nn.Sequential(nn.LazyBatchNorm2d(eps=0.1), nn.ReLU())
    ours = batchnorm.convert(model, "batchnorm").model
    assert type(ours[0]) is batchnorm.LazyBatchNorm2d
    ours(X)
    assert (type(ours[0]), ours[0].num_features, ours[0].eps) == (batchnorm.BatchNorm2d, 3, 0.1)
    assert "run one batch" in reasons(batchnorm.convert(model, "torch-sync"))["0"]


def test_what_would_be_lost() -> None:
    class Own(nn.BatchNorm2d):
        pass

    model = nn.Sequential(
        batchnorm.BatchNorm2d(3, activation="relu"),
        batchnorm.BatchNorm2d(3, nonfinite="skip"),
        Own(3),
        batchnorm.freeze(nn.BatchNorm2d(3)).model,
        batchnorm.BatchNorm2d(3),
    )
    changes = batchnorm.convert(model, "torch")
    assert reasons(changes) == {
        "0": "it holds the activation 'relu', which BatchNorm2d does not have",
        "1": "it has nonfinite='skip', which BatchNorm2d does not have",
        "2": "Own is a class of its own, which may do more than normalize",
        "3": "it is frozen: unfreeze it first",
    }
    assert names(changes) == ["4"]

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = batchnorm.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(x, x)

    assert "called with a residual" in reasons(batchnorm.convert(Residual(), "torch"))["bn"]
    assert not batchnorm.convert(Residual(), "batchnorm").skipped


def test_a_member_registers_itself() -> None:
    class Ghost(nn.BatchNorm2d):
        def __init__(self, num_features, *, size=2, **options) -> None:
            super().__init__(num_features, **options)
            self.size = size

    register(Family("ghost-test", {2: Ghost}))
    try:
        model = batchnorm.convert(net(), "ghost-test", size=4).model
        assert (type(model[1]), model[1].size) == (Ghost, 4)
        assert type(batchnorm.convert(model, "torch").model[1]) is nn.BatchNorm2d
        with pytest.raises(batchnorm.InputError, match="twice"):
            register(Family("ghost-test", {}))
    finally:
        del FAMILIES["ghost-test"]


def test_a_rule_for_single_values_is_not_lost() -> None:
    model = nn.Sequential(batchnorm.BatchNorm2d(3, single="zero"))
    changes = batchnorm.convert(model, "torch")
    assert reasons(changes)["0"] == "it has single='zero', which BatchNorm2d does not have"
    assert not batchnorm.convert(model, "ghost").skipped
