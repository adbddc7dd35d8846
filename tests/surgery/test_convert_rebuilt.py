"""convert to layers that are new modules, and back; what the other tools make of them."""

import copy

import pytest
import torch
from surgery_helpers import names, notes, randomize, reasons
from torch import nn

import batchnorm
from batchnorm.nn.families import FAMILIES, Family, register

X = torch.randn(8, 3, 6, 6)
LABELS = torch.arange(8) % 3


def net() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4, eps=1e-3, momentum=0.2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 5),
        batchnorm.BatchNorm1d(5, activation="relu", nonfinite="skip"),
        nn.Linear(5, 2),
    )
    return randomize(model)


def told(to: str):
    """How a converted network is called: the block around it."""
    return batchnorm.domain("b") if to == "domain" else batchnorm.condition(LABELS)


CASES = [
    pytest.param("domain", {"domains": ("a", "b")}, {"domain": "b"}, id="domain"),
    pytest.param("domain", {"domains": ["a", "b"], "shared_affine": False}, {"domain": "b"}, id="own"),
    pytest.param("conditional", {"num_classes": 3}, {"condition": 1}, id="conditional"),
]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("to", "options", "keep"), CASES)
def test_there_and_back(to: str, options, keep, inplace: bool) -> None:
    model = net()
    plain, layers = copy.deepcopy(model), [model[1], model[5]]
    state = copy.deepcopy(model.state_dict())
    changes = batchnorm.convert(model, to, inplace=inplace, **options)
    made = changes.model
    assert (made is model) == inplace
    assert names(changes) == ["1", "5"]
    assert "all of which begin with its numbers" in notes(changes)["1"]
    for training in (True, False):
        with told(to):
            torch.testing.assert_close(made.train(training)(X), plain.train(training)(X))
    back = batchnorm.convert(made, "batchnorm", inplace=inplace, **keep)
    assert [type(back.model[i]) for i in (1, 5)] == [batchnorm.BatchNorm2d, batchnorm.BatchNorm1d]
    assert notes(back)["1"] == f"the numbers of {next(iter(keep))}={next(iter(keep.values()))!r}"
    torch.testing.assert_close(back.model.state_dict(), plain.state_dict())
    assert [back.model[1].eps, back.model[1].momentum, back.model[5].activation, back.model[5].nonfinite] == [
        1e-3,
        0.2,
        "relu",
        "skip",
    ]
    torch.testing.assert_close(back.model(X), plain(X))
    reverted = back.revert()
    assert (reverted is made) == inplace
    with told(to):
        torch.testing.assert_close(reverted(X), plain(X))
    again = changes.revert()
    assert (again is model) == ([again[1], again[5]] == layers) == inplace
    assert [type(again[i]) for i in (1, 5)] == [type(layer) for layer in layers]
    torch.testing.assert_close(again.state_dict(), state, rtol=0, atol=0)


def test_the_class_that_is_kept_and_statistics_of_its_own() -> None:
    made = batchnorm.convert(net(), "conditional", num_classes=3).model
    randomize(made)
    for name in ("class_weight", "class_bias"):
        nn.init.normal_(getattr(made[1], name))
    state = copy.deepcopy(made.state_dict())
    for kept in range(3):
        back = batchnorm.convert(made, "batchnorm", condition=kept, inplace=True)
        assert torch.equal(made[1].weight, state["1.class_weight"][kept])
        assert torch.equal(made[1].bias, state["1.class_bias"][kept])
        made.train()(X)
        back.revert()
        torch.testing.assert_close(made.state_dict(), state, rtol=0, atol=0)


def test_the_batch_norms_inside_stay_in_their_place() -> None:
    class Ghost(batchnorm.BatchNorm2d):
        pass

    register(Family("ghost-test", {2: Ghost}))
    try:
        made = batchnorm.convert(net(), "domain", domains=("a", "b")).model
        inside = batchnorm.convert(made, "ghost-test")
        assert names(inside) == ["1.a", "1.b"]
        assert "say whose to keep" in reasons(inside)["1"]
        assert type(inside.model[1].b) is Ghost
        assert inside.model[1].a.weight is inside.model[1].b.weight
        kept = batchnorm.convert(made, "ghost-test", domain="a")
        assert names(kept) == ["1"]
        assert {*reasons(kept)} == {"5", "5.a", "5.b"}  # of another number of axes
        assert type(kept.model[1]) is Ghost
    finally:
        del FAMILIES["ghost-test"]
    direct = nn.Sequential(batchnorm.DomainBatchNorm(3))
    assert {*reasons(batchnorm.convert(direct, "batchnorm"))} == {"0"}


@pytest.mark.parametrize("to", ["torch", "torch-sync"])
def test_back_to_pytorch_s(to: str) -> None:
    model = net()
    model[5] = nn.BatchNorm1d(5)
    made = batchnorm.convert(model, "domain", default="clean").model
    assert names(batchnorm.convert(made, to)) == []
    changes = batchnorm.convert(made, to, domain="clean")
    classes = [nn.BatchNorm2d, nn.BatchNorm1d] if to == "torch" else [nn.SyncBatchNorm] * 2
    assert [type(changes.model[i]) for i in (1, 5)] == classes
    assert [type(batchnorm.convert(changes.model, "torch").model[i]) for i in (1, 5)] == [
        nn.BatchNorm2d,
        nn.BatchNorm1d,
    ]
    activated = batchnorm.convert(batchnorm.convert(net(), "domain").model, to, domain="clean")
    assert names(activated) == ["1"]
    assert "it holds the activation 'relu'" in reasons(activated)["5"]
    assert type(activated.model[5]) is batchnorm.DomainBatchNorm


def test_parameters_stay_the_same_objects() -> None:
    model = net()
    weight = model[1].weight
    batchnorm.convert(model, "domain", domains=("a", "b"), inplace=True)
    assert model[1].a.weight is model[1].b.weight is weight
    assert model[1].a.running_mean is not model[1].b.running_mean
    kept = batchnorm.convert(model, "batchnorm", domain="b", inplace=True)
    assert model[1].weight is weight
    kept.revert()
    own = batchnorm.convert(
        model, "domain", domains=("c", "d"), shared_affine=False, domain="a", inplace=True
    )
    assert model[1].c.weight is weight
    assert model[1].d.weight is not weight
    assert torch.equal(model[1].d.weight, weight)
    assert own.revert()[1].b.weight is weight
    model[1].a.weight.requires_grad_(False)
    assert not batchnorm.convert(model, "batchnorm", domain="a").model[1].weight.requires_grad
    frozen = batchnorm.convert(net(), "conditional", num_classes=2)
    frozen.revert()[1].weight.requires_grad_(False)
    assert (
        not batchnorm.convert(frozen.model, "conditional", num_classes=2).model[1].class_weight.requires_grad
    )


def test_shared_layers_hooks_modes_and_the_root() -> None:
    norm = nn.BatchNorm2d(3).eval()
    model = nn.Sequential(norm, nn.Sequential(norm))
    changes = batchnorm.convert(model, "domain", inplace=True)
    assert model[0] is model[1][0]
    assert changes.changed[0].also == ("1.0",)
    assert [model[0].training, model[0].clean.training] == [False, False]
    assert changes.revert()[0] is model[1][0] is norm
    changes = batchnorm.convert(model, "conditional", num_classes=2, inplace=True)
    assert model[0] is model[1][0]
    assert not model[0].training
    model.train()
    assert changes.revert()[0].training
    root = batchnorm.convert(norm, "domain", inplace=True)
    assert type(root.model) is batchnorm.DomainBatchNorm
    assert root.revert() is norm
    norm.register_forward_hook(lambda *arguments: None)
    for to, options in (("domain", {}), ("conditional", {"num_classes": 2})):
        assert "forward hook, which would be lost" in reasons(batchnorm.convert(model, to, **options))["0"]
    made = batchnorm.DomainBatchNorm(3)
    made.adversarial.register_forward_hook(lambda *arguments: None)
    hooked = batchnorm.convert(nn.Sequential(made), batchnorm.BatchNorm2d, domain="clean")
    assert "would be lost" in reasons(hooked)["0"]


def test_what_is_left_alone() -> None:
    class Own(nn.BatchNorm2d):
        pass

    frozen = batchnorm.freeze(nn.BatchNorm2d(3)).model
    model = nn.Sequential(Own(3), frozen, nn.LazyBatchNorm2d(), nn.SyncBatchNorm(3))
    domain = reasons(batchnorm.convert(model, "domain"))
    conditional = reasons(batchnorm.convert(model, "conditional", num_classes=2))
    assert domain == {
        "0": "Own is a class of its own, which may do more than normalize",
        "1": "it is frozen: unfreeze it first",
        "2": "its shape is not known yet: run one batch through the model first",
    }
    assert conditional == domain | {
        "3": "SyncBatchNorm does more than plain batch norm, which ConditionalBatchNorm would not"
    }
    made = batchnorm.convert(net(), "domain").model
    assert reasons(batchnorm.convert(made, "batchnorm")) == dict.fromkeys(
        "15", "it has statistics for each domain: say whose to keep with domain="
    )
    assert (
        reasons(batchnorm.convert(made, "torch", domain="x"))["1"]
        == "it has no domain 'x', but 'clean', 'adversarial'"
    )
    assert names(batchnorm.convert(made, "domain")) == []
    again = batchnorm.convert(made, "domain", domains=("a",))
    assert "say whose to keep" in reasons(again)["1"]
    assert batchnorm.convert(made, "domain", domains=("a",), domain="clean").model[1].domains == ("a",)
    made = batchnorm.convert(net(), "conditional", num_classes=2).model
    for wrong in (2, -1, True, "0"):
        assert (
            f"it has no class {wrong!r}, but 0 to 1"
            in reasons(batchnorm.convert(made, "torch", condition=wrong))["1"]
        )
    assert "say whose to keep with condition=" in reasons(batchnorm.convert(made, "torch"))["1"]
    film = nn.Sequential(batchnorm.ConditionalBatchNorm(3))
    assert "given with each call" in reasons(batchnorm.convert(film, nn.BatchNorm1d, condition=0))["0"]
    assert "domain= says nothing here" in batchnorm.convert(net(), "torch", domain="a").notes[0]


def test_options() -> None:
    made = batchnorm.convert(
        net(), "domain", domains=("a", "b"), default="b", eps=0.5, activation="silu", backend="aten"
    ).model
    assert [made[1].default, made[1].a.eps, made[1].b.activation, made[1].b.backend] == [
        "b",
        0.5,
        "silu",
        "aten",
    ]
    assert made[1].a.momentum == 0.2
    made = batchnorm.convert(net(), "conditional", num_classes=2, eps=0.5, nonfinite="skip").model
    assert [made[1].eps, made[1].nonfinite, made[1].num_classes] == [0.5, "skip", 2]
    back = batchnorm.convert(made, "batchnorm", condition=0, momentum=None, single="zero").model
    assert [back[1].momentum, back[1].single, back[1].eps] == [None, "zero", 0.5]
    for to, options, text in (
        ("conditional", {}, "num_classes: got none"),
        ("conditional", {"num_classes": 0}, "num_classes: got 0"),
        ("conditional", {"domains": ("a",)}, "option of ConditionalBatchNorm: got 'domains'"),
        ("domain", {"domains": ("a", "a")}, "'a' twice"),
        ("domain", {"num_classes": 2}, "option of DomainBatchNorm: got 'num_classes'"),
        ("batchnorm", {"num_classes": 2}, r"option of BatchNorm\dd: got 'num_classes'"),
        ("domain", {"eps": -1}, "eps"),
        ("domain", {"affine": False}, "affine"),
    ):
        with pytest.raises(batchnorm.InputError, match=text):
            batchnorm.convert(net(), to, **options)
    model = net()
    dry = batchnorm.convert(model, "domain", dry_run=True, inplace=True)
    assert names(dry) == ["1", "5"]
    assert type(model[1]) is nn.BatchNorm2d


def test_plain_layers_of_every_kind_become_conditional() -> None:
    for layer in (
        nn.BatchNorm2d(3, affine=False),
        nn.BatchNorm2d(3, track_running_stats=False),
        batchnorm.BatchNorm2d(3, bias=False, dtype=torch.float64),
    ):
        model = nn.Sequential(randomize(layer))
        x = X.to(
            torch.float64 if layer.weight is not None and layer.weight.dtype == torch.float64 else X.dtype
        )
        made = batchnorm.convert(model, "conditional", num_classes=3).model
        with told("conditional"):
            torch.testing.assert_close(made.eval()(x), model.eval()(x))
        back = batchnorm.convert(made, "batchnorm", condition=2).model
        torch.testing.assert_close(back(x), model(x))
        assert (back[0].bias is None) == (made[0].class_bias is None)


class Called(nn.Module):
    """Calls its batch norm with more than the input."""

    def __init__(self, norm: nn.Module, how: str) -> None:
        super().__init__()
        self.conv, self.norm, self.how = nn.Conv2d(3, 3, 1), norm, how

    def forward(self, x, labels=None):
        x = self.conv(x)
        if self.how == "residual":
            return self.norm(x, x)
        if self.how == "domain":
            return self.norm(x, domain="clean")
        return self.norm(x, labels)


def test_calls_with_more_than_the_input() -> None:
    residual = Called(batchnorm.BatchNorm2d(3), "residual")
    assert (
        "where the condition would stand"
        in reasons(batchnorm.convert(residual, "conditional", num_classes=2))["norm"]
    )
    made = batchnorm.convert(residual, "domain").model
    with batchnorm.domain("clean"):
        torch.testing.assert_close(made(X), residual(X))
    assert "called with a residual" in reasons(batchnorm.convert(made, "torch", domain="clean"))["norm"]
    torch.testing.assert_close(batchnorm.convert(made, "batchnorm", domain="clean").model(X), residual(X))
    given = Called(batchnorm.DomainBatchNorm(3), "domain")
    assert "calls it with a domain" in reasons(batchnorm.convert(given, "batchnorm", domain="clean"))["norm"]

    class Labels(Called):
        def forward(self, x, labels):
            return self.norm(self.conv(x), labels)

    labels = Labels(batchnorm.ConditionalBatchNorm(3, 4), "")
    assert "calls it with a condition" in reasons(batchnorm.convert(labels, "batchnorm", condition=1))["norm"]


def test_axes_of_layers_that_were_made_for_any_number() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        batchnorm.DomainBatchNorm(4),
        nn.Conv2d(4, 4, 1),
        batchnorm.ConditionalBatchNorm(4, 3),
    )
    keep = {"domain": "clean", "condition": 0}
    for to, cls in (("batchnorm", batchnorm.BatchNorm2d), ("torch", nn.BatchNorm2d)):
        back = batchnorm.convert(model, to, **keep).model
        assert [type(back[1]), type(back[3])] == [cls, cls]
    assert (
        "does not say for how many axes"
        in reasons(batchnorm.convert(model[1], "batchnorm", domain="clean"))[""]
    )
    named = batchnorm.convert(model[1], batchnorm.BatchNorm3d, domain="clean")
    assert type(named.model) is batchnorm.BatchNorm3d
    both = batchnorm.convert(model, "conditional", num_classes=2, domain="clean", condition=2).model
    assert [type(both[1]), both[3].num_classes] == [batchnorm.ConditionalBatchNorm, 2]
    away = batchnorm.convert(
        batchnorm.convert(net(), "conditional", num_classes=2).model, "domain", condition=1
    ).model
    assert type(away[1].clean) is batchnorm.BatchNorm2d


def test_the_batch_norms_inside_can_be_of_another_class() -> None:
    sync = batchnorm.convert(batchnorm.convert(net()[:3], "torch-sync").model, "domain").model
    assert type(sync[1].clean) is nn.SyncBatchNorm
    assert sync[1].clean.weight is sync[1].adversarial.weight
    with batchnorm.domain("clean"):
        sync.eval()(X)
        with pytest.raises(batchnorm.ModelError, match="a residual, a mask or inplace for a SyncBatchNorm"):
            sync[1](torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3))
    ours = batchnorm.convert(sync, batchnorm.BatchNorm2d)
    assert type(ours.model[1].clean) is batchnorm.BatchNorm2d
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(batchnorm.DomainBatchNorm(3))
    assert synchronized.clean.weight is synchronized.adversarial.weight


def test_frozen_is_taken_back_with_the_rest() -> None:
    model = batchnorm.convert(net(), "domain", domains=("a", "b")).model
    frozen = batchnorm.convert(model, "frozen", domain="b", inplace=True)
    assert type(model[1]) is batchnorm.FrozenBatchNorm
    assert not model[1].weight.requires_grad
    assert frozen.revert()[1].a.weight.requires_grad
    batchnorm.convert(model, "frozen", domain="b", inplace=True, dry_run=True)
    assert model[1].a.weight.requires_grad


def test_members_of_the_family_inside() -> None:
    model = nn.Sequential(batchnorm.GhostBatchNorm(3, ghost_size=2), batchnorm.BatchRenorm(3))
    made, x = batchnorm.convert(model, "domain").model, torch.randn(8, 3)
    with batchnorm.domain("clean"):
        torch.testing.assert_close(made(x), model(x))
    kept = batchnorm.convert(made, "ghost", domain="clean")
    assert type(kept.model[0]) is batchnorm.GhostBatchNorm
    assert kept.model[0].ghost_size == 2
    refused = batchnorm.convert(model, "conditional", num_classes=2)
    assert all("does more than plain batch norm" in reason for reason in reasons(refused).values())
    assert len(refused.skipped) == 2
