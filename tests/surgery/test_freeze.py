import copy
import pickle

import pytest
import torch
from surgery_helpers import names, notes, randomize, reasons
from torch import nn

import batchnorm

X = torch.randn(8, 3, 5, 5)


def net() -> nn.Sequential:
    return randomize(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), batchnorm.BatchNorm2d(4))
    )


def buffers(model: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_frozen_statistics_stay_through_training() -> None:
    model = net()
    keys, before, x = list(model.state_dict()), buffers(model), X * 3 + 1
    expected = copy.deepcopy(model).eval()(x)
    frozen = batchnorm.freeze(model).model
    frozen.train()
    for module in frozen.modules():
        module.training = True
    assert (frozen.training, frozen[1].training, frozen[3].training) == (True, False, False)
    assert torch.equal(frozen(x), expected)
    assert same(buffers(frozen), before)
    assert list(frozen.state_dict()) == keys
    assert isinstance(frozen[1], nn.BatchNorm2d)
    assert isinstance(frozen[3], batchnorm.BatchNorm2d)
    torch.optim.swa_utils.update_bn([x], frozen)
    assert same(buffers(frozen), before)
    model.train()(x)
    assert not same(buffers(model), before)


def test_frozen_affine_is_not_trained() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1, momentum=0.9)
    batchnorm.freeze(model, statistics=False, inplace=True)
    weight, conv, mean = model[1].weight.clone(), model[0].weight.clone(), model[1].running_mean.clone()
    model.train()(X).square().sum().backward()
    optimizer.step()
    assert torch.equal(model[1].weight, weight)
    assert not torch.equal(model[0].weight, conv)
    assert not torch.equal(model[1].running_mean, mean)
    assert type(model[1]) is nn.BatchNorm2d


def test_frozen_statistics_with_trained_affine() -> None:
    model = batchnorm.freeze(net(), affine=False).model.train()
    before = buffers(model)
    model(X).square().sum().backward()
    assert same(buffers(model), before)
    assert model[1].weight.grad.abs().sum() > 0
    reference = copy.deepcopy(batchnorm.unfreeze(model).model).eval()
    reference.zero_grad()
    reference(X).square().sum().backward()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_unfreeze_gives_the_mode_of_the_model() -> None:
    model = net().eval()
    batchnorm.freeze(model, inplace=True)
    model.train()
    changes = batchnorm.unfreeze(model, inplace=True)
    assert notes(changes) == {
        "1": "statistics, weight, bias unfrozen",
        "3": "statistics, weight, bias unfrozen",
    }
    assert [type(model[1]), type(model[3])] == [nn.BatchNorm2d, batchnorm.BatchNorm2d]
    assert model[1].training
    assert model[3].weight.requires_grad
    before = buffers(model)
    model(X)
    assert not same(buffers(model), before)
    assert batchnorm.unfreeze(model).changed == ()
    frozen = batchnorm.freeze(net()).model
    part = nn.ModuleDict({"a": frozen, "b": batchnorm.freeze(net()).model})
    batchnorm.unfreeze(part["b"], inplace=True)
    assert [part["a"][1].training, part["b"][1].training] == [False, True]


def test_revert_is_exact() -> None:
    model = net()
    model[1].eval()
    model[3].weight.requires_grad_(False)
    objects = [*model.modules(), *model.parameters(), *model.buffers()]
    flags = [module.training for module in model.modules()]
    attributes = [vars(module).keys() for module in copy.deepcopy(model).modules()]
    changes = batchnorm.freeze(model, inplace=True)
    assert notes(changes) == {"1": "statistics, weight, bias frozen", "3": "statistics, bias frozen"}
    assert changes.revert() is model
    assert [module.training for module in model.modules()] == flags
    assert [vars(module).keys() for module in model.modules()] == attributes
    assert [type(model[1]), type(model[3])] == [nn.BatchNorm2d, batchnorm.BatchNorm2d]
    assert [p.requires_grad for p in (model[1].weight, model[3].weight, model[3].bias)] == [True, False, True]
    now = [*model.modules(), *model.parameters(), *model.buffers()]
    assert all(a is b for a, b in zip(objects, now, strict=True))
    batchnorm.freeze(model, inplace=True)
    changes = batchnorm.unfreeze(model, inplace=True)
    changes.revert()
    assert type(model[1]).__name__ == "FrozenBatchNorm2d"


@pytest.mark.parametrize("mode", [False, True])
def test_revert_leaves_the_mode_of_now(mode: bool) -> None:
    model = net().train(not mode)
    changes = batchnorm.freeze(model, inplace=True)
    model.train(mode)
    assert all(module.training == mode for module in changes.revert().modules())


def test_a_frozen_layer_that_was_out_of_the_model_remembers_its_mode() -> None:
    model = net().train()
    batchnorm.freeze(model, inplace=True)
    batchnorm.remove(model, inplace=True).revert()
    batchnorm.unfreeze(model, inplace=True)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("first", [{"affine": False}, {"statistics": False}, {}])
@pytest.mark.parametrize("second", [batchnorm.freeze, batchnorm.unfreeze])
def test_no_layer_is_left_half_frozen(first: dict[str, bool], second) -> None:
    """The older of two operations on the same layers is not reverted before the newer one."""
    model = net()
    older = batchnorm.freeze(model, inplace=True, **first)
    newer = second(model, inplace=True)
    if not newer.changed:
        assert first == {}  # frozen already
        return
    state = [(type(m), [p.requires_grad for p in m.parameters()]) for m in model.modules()]
    with pytest.raises(batchnorm.ModelError, match="Revert the later change first"):
        older.revert()
    assert [(type(m), [p.requires_grad for p in m.parameters()]) for m in model.modules()] == state
    newer.revert()
    older.revert()
    assert [type(model[1]), type(model[3])] == [nn.BatchNorm2d, batchnorm.BatchNorm2d]
    assert all(p.requires_grad for p in model.parameters())


def test_frozen_layers_are_copied_pickled_compiled_and_traced() -> None:
    model = batchnorm.freeze(net()).model.train()
    expected = model(X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[1]) is type(model[1])
        assert torch.equal(other.train()(X), expected)
        assert other[1].weight is not model[1].weight
    assert torch.equal(torch.fx.symbolic_trace(model)(X), expected)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), expected)
    model.load_state_dict(randomize(net()).state_dict())
    assert not torch.allclose(model(X), expected)


def test_frozen_layers_are_folded_and_not_fused() -> None:
    model = batchnorm.freeze(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).model.eval()
    assert names(batchnorm.fold(model)) == ["1"]
    assert reasons(batchnorm.fuse(model))["1"].startswith("FrozenBatchNorm2d is a class of its own")


def test_what_has_nothing_to_freeze() -> None:
    model = nn.Sequential(
        nn.LazyBatchNorm2d(),
        nn.BatchNorm2d(3, track_running_stats=False, affine=False),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.SyncBatchNorm(3),
    )
    changes = batchnorm.freeze(model)
    assert reasons(changes) == {
        "0": "its shape is not known yet: run one batch through the model first",
        "1": "it has no running statistics to normalize with; no weight or bias of it is trained",
    }
    assert notes(changes)["2"] == "weight, bias frozen; it has no running statistics to normalize with"
    assert notes(changes)["3"] == "statistics, weight, bias frozen"
    again = batchnorm.freeze(changes.model)
    assert again.changed == ()
    assert reasons(again)["3"] == "its statistics are frozen already; no weight or bias of it is trained"
    for call in (batchnorm.freeze, batchnorm.unfreeze):
        with pytest.raises(batchnorm.InputError, match="at least one of them"):
            call(model, statistics=False, affine=False)
    assert not batchnorm.freeze(nn.Linear(2, 2)).changed


def test_shared_layers_and_the_model_itself() -> None:
    norm = nn.BatchNorm2d(3)
    changes = batchnorm.freeze(nn.Sequential(norm, nn.ReLU(), norm))
    assert changes.model[0] is changes.model[2]
    assert changes.changed[0].also == ("2",)
    batchnorm.freeze(norm, inplace=True)
    assert not norm.train().training
