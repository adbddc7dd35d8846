"""`recalibrate` against all inputs of a layer put into one matrix."""

import copy
import json
from typing import Any

import pytest
import torch
from helpers import same_bits
from stats_helpers import Branches, assert_same_state, in_training_mode, inputs_of, norms, state
from torch import Tensor, nn

import batchnorm


def batches(sizes: tuple[int, ...] = (7, 7, 7, 3), shift: float = 2.0) -> list[Tensor]:
    """Uneven batches, each about a mean of its own."""
    return [torch.randn(size, 2, 6, 5) * (1 + k) + shift * k for k, size in enumerate(sizes)]


def close(layer: Any, mean: Tensor, var: Tensor, atol: float = 2e-6) -> None:
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=atol)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("ours", [False, True], ids=["torch", "ours"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_joint_is_the_pooled_mean_and_variance_with_batches_normalized_by_themselves(
    ours: bool, training: bool
) -> None:
    model, data = Branches(ours=ours).train(training), batches()
    expected = in_training_mode(model, data)
    before = state(model)
    result = batchnorm.recalibrate(model, data)
    for name, layer in norms(model).items():
        close(layer, *expected[name])
        assert layer.num_batches_tracked.item() == 4
    assert (result.samples, result.batches, result.passes, result.stopped_by) == (24, 4, 1, "end")
    after = state(model)
    assert (after["flags"], after["hooks"], after["grad"]) == (
        before["flags"],
        before["hooks"],
        before["grad"],
    )
    for (name, place, value), (_, old_place, old) in zip(
        after["parameters"], before["parameters"], strict=True
    ):
        assert place == old_place, name
        assert same_bits(value, old)
    assert [place for _, place, _ in after["buffers"]] == [place for _, place, _ in before["buffers"]]


@pytest.mark.parametrize("shared", [False, True], ids=["once", "twice"])
def test_sequential_is_what_the_network_sees_in_eval(shared: bool) -> None:
    class Twice(Branches):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(-2 * x)

    model, data = (Twice() if shared else Branches()).train(), batches((9, 2, 1, 5))
    result = batchnorm.recalibrate(model, data, mode="sequential")
    assert result.passes < 4 * (2 if shared else 1)  # four layers; the two branches share a pass
    found = inputs_of(model.eval(), data, lambda net, batch: net(batch))
    for name, layer in norms(model).items():
        close(layer, found[name].mean(0), found[name].var(0))
    assert not result.notes


def test_sequential_of_a_chain_takes_a_pass_a_layer() -> None:
    model = nn.Sequential(
        *(part for _ in range(5) for part in (nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()))
    )
    data = [torch.randn(6, 4) + k for k in range(5)]
    result = batchnorm.recalibrate(model, data, mode="sequential")
    assert result.passes == 5
    found = inputs_of(model.eval(), data, lambda net, batch: net(batch))
    for name, layer in norms(model).items():
        close(layer, found[name].mean(0), found[name].var(0))


def test_a_layer_that_feeds_itself_settles_or_is_told() -> None:
    class Loop(nn.Module):
        def __init__(self, gain: float) -> None:
            super().__init__()
            self.norm, self.gain = nn.BatchNorm1d(3), gain

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + self.gain * self.norm(x))

    data = [torch.randn(32, 3) + 1 for _ in range(4)]
    model = Loop(0.1).eval()
    result = batchnorm.recalibrate(model, data, mode="sequential")
    found = inputs_of(model, data, lambda net, batch: net(batch))["norm"]
    close(model.norm, found.mean(0), found.var(0), atol=1e-4)
    assert not result.notes
    wild = batchnorm.recalibrate(Loop(-30.0).eval(), data, mode="sequential")
    assert "fed by its own output" in wild.notes[-1]


def test_class_sorted_batches_give_what_one_batch_gives() -> None:
    x = torch.cat([torch.randn(40, 3, 4) * 0.1 + 10 * k for k in range(10)])
    model = nn.Sequential(nn.BatchNorm1d(3))
    batchnorm.recalibrate(model, x.split(20))
    whole = x.double().transpose(0, 1).flatten(1)
    close(model[0], whole.mean(1), whole.var(1), atol=1e-4)
    assert model[0].running_var.min() > 800  # an average of the batches' variances would be 0.01


def test_an_offset_of_a_million_sigma_costs_nothing() -> None:
    x = torch.randn(512, 2, dtype=torch.float64) * 1e-3 + 1e3
    model = nn.Sequential(nn.BatchNorm1d(2, dtype=torch.float64))
    batchnorm.recalibrate(model, x.split(100))
    torch.testing.assert_close(model[0].running_var, x.var(0), rtol=1e-9, atol=0)


def test_a_mask_counts_what_it_holds() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = batchnorm.BatchNorm1d(2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.norm(x, mask=mask)

    data = []
    for length in (3, 9, 6):
        x, weight = torch.randn(5, 2, 9) * length, torch.rand(5, 9) * (torch.arange(9) < length)
        x[:, :, length:] = float("nan")
        data.append({"x": x, "mask": weight * 4})
    model = Masked()
    batchnorm.recalibrate(model, data)
    x = torch.cat([batch["x"].transpose(0, 1).flatten(1) for batch in data], 1).double()
    w = torch.cat([batch["mask"].flatten() for batch in data]).double()
    x, w = x[:, w > 0], w[w > 0]
    mean = (w * x).sum(1) / w.sum()
    close(model.norm, mean, (w * (x - mean[:, None]).square()).sum(1) / (w.sum() - 1))


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "dict", "forward"])
def test_kinds_of_batches(kind: str) -> None:
    class Named(nn.Sequential):
        def forward(self, images: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(images * scale)

    model, data = Named(nn.BatchNorm2d(2)), batches()
    labels = torch.zeros(9)
    made: dict[str, list[Any]] = {
        "tensor": data,
        "tuple": [(x, labels) for x in data],
        "list": [[x, labels] for x in data],
        "dict": [{"images": x / 2, "scale": 2.0} for x in data],
        "forward": [("ignored", {"deep": x}) for x in data],
    }
    forward = (lambda net, batch: net(batch[1]["deep"])) if kind == "forward" else None
    result = batchnorm.recalibrate(model, made[kind], forward=forward)
    x = torch.cat(data).double().transpose(0, 1).flatten(1)
    close(model[0], x.mean(1), x.var(1))
    assert result.samples == 24


def test_frozen_layers_and_unreached_ones_are_left_alone() -> None:
    model = nn.Sequential(
        *(nn.BatchNorm2d(2) for _ in range(4)), nn.BatchNorm2d(2, track_running_stats=False)
    )
    model.add_module("unused", nn.ModuleList([nn.BatchNorm1d(3)]))
    model.train()
    model[1].eval()
    model[2].momentum = 0.0
    model[3].track_running_stats = False
    for layer in (model[1], model[2], model[3]):
        layer.running_mean.fill_(0.5)
    kept = {name: value.clone() for name, value in model.state_dict().items() if name[0] in "1234u"}
    result = batchnorm.recalibrate(model, batches(), forward=lambda net, x: nn.Sequential(*list(net)[:5])(x))
    assert [layer.name for layer in result.layers] == ["0"]
    reasons = {skip.name: skip.reason for skip in result.skipped}
    assert "eval mode" in reasons["1"]
    assert "momentum is 0" in reasons["2"]
    assert "track_running_stats" in reasons["3"]
    assert "no running statistics" in reasons["4"]
    assert "no batch reached it" in reasons["unused.0"]
    for name, value in kept.items():
        assert same_bits(model.state_dict()[name], value), name
    model.eval()  # in a model that does not train, eval mode says nothing
    assert "1" in [
        layer.name
        for layer in batchnorm.recalibrate(model, batches(), forward=lambda net, x: net[1](x)).layers
    ]


def test_a_frozen_layer_normalizes_with_what_it_has() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2)).train()
    model[0].eval()
    model[0].running_var.fill_(4.0)
    data = batches()
    batchnorm.recalibrate(model, data)
    x = torch.cat(data).double().transpose(0, 1).flatten(1) / (4 + 1e-5) ** 0.5
    close(model[1], x.mean(1), x.var(1))


class Stop(BaseException):
    """Ctrl-C's kin."""


@pytest.mark.parametrize("mode", ["joint", "sequential"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Stop])
@pytest.mark.parametrize("where", ["loader", "model", "second pass"])
def test_whatever_goes_wrong_leaves_the_model_as_it_was(
    where: str, error: type[BaseException], mode: Any
) -> None:
    if where == "second pass" and mode == "joint":
        mode = "sequential"
    model = Branches().train()
    model.left.eval()
    model.register_buffer("calls", torch.zeros(()))
    runs = 0

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        net.calls.add_(1)
        if (where, runs) in (("model", 3), ("second pass", 6)):
            raise error
        return net(x)

    class Loader:
        def __iter__(self) -> Any:
            yield from batches()[:3]
            if where == "loader":
                raise error
            yield batches()[3]

    before = state(model)
    with pytest.raises(error):
        batchnorm.recalibrate(model, Loader(), forward=forward, mode=mode)
    assert runs >= 3
    assert_same_state(model, before)
    assert model.calls == 0


def test_other_buffers_are_put_back_after_success_too() -> None:
    class Counting(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = x.mean()
            return super().forward(x)

    model = Counting(nn.BatchNorm2d(2))
    model.register_buffer("calls", torch.zeros(()))
    model.register_buffer("last", torch.zeros(()))
    place = id(model.last)
    batchnorm.recalibrate(model, batches())
    assert (model.calls, model.last, id(model.last)) == (0, 0, place)


def test_nan_is_refused_with_its_layer() -> None:
    model, data = Branches(), batches()
    data[2][1, 0] = float("nan")
    before = state(model)
    with pytest.raises(batchnorm.DataError, match=r"input of stem\.1: got NaN or Inf in call 3"):
        batchnorm.recalibrate(model, data)
    assert_same_state(model, before)


def test_poisoned_statistics_are_healed_and_told() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2))
    model[0].running_mean.fill_(float("nan"))
    model[0].running_var.fill_(float("inf"))
    result = batchnorm.recalibrate(model, batches())
    assert model[0].running_mean.isfinite().all()
    assert result.shift == float("inf")
    assert "was not finite" in str(result)
    stored = json.loads(result.to_json())
    assert stored["layers"][0]["mean_before"] == [None, None]
    assert (stored["kind"], stored["schema_version"], stored["samples"]) == ("recalibration", 1, 24)


def test_revert_and_files(tmp_path: Any) -> None:
    model = Branches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = batchnorm.recalibrate(model, batches())
    assert result.layers[0].shift > 0.1
    assert "<table>" in result.save(tmp_path / "r.html").read_text("utf-8")
    assert json.loads(result.save(tmp_path / "r.json").read_text("utf-8"))["mode"] == "joint"
    assert result.save(tmp_path / "r.txt").read_text("utf-8") == f"{result}\n"
    result.revert()
    for name, value in model.state_dict().items():
        assert same_bits(value, before[name]), name
    model.stem[1].running_mean.fill_(7.0)
    result.revert()
    assert model.stem[1].running_mean[0] == 7.0
    other = batchnorm.recalibrate(model, batches())
    model.last.running_var = None
    now = model.stem[1].running_mean.clone()
    with pytest.raises(batchnorm.ModelError, match="revert of recalibrate: last"):
        other.revert()
    assert torch.equal(model.stem[1].running_mean, now)


def test_wrappers_and_compiled_models_are_looked_into() -> None:
    for wrap in (nn.DataParallel, lambda net: torch.compile(net, backend="eager")):
        model, data = nn.Sequential(nn.BatchNorm2d(2)), batches()
        batchnorm.recalibrate(wrap(model), data)
        x = torch.cat(data).double().transpose(0, 1).flatten(1)
        close(model[0], x.mean(1), x.var(1))


def test_synchronized_and_half_layers() -> None:
    data = batches()
    sync = nn.Sequential(nn.SyncBatchNorm(2)).train()
    batchnorm.recalibrate(sync, data)
    x = torch.cat(data).double().transpose(0, 1).flatten(1)
    close(sync[0], x.mean(1), x.var(1))
    half = nn.Sequential(nn.BatchNorm2d(2, dtype=torch.bfloat16))
    batchnorm.recalibrate(half, [part.bfloat16() for part in data])
    torch.testing.assert_close(half[0].running_mean, x.mean(1).bfloat16(), rtol=0.01, atol=0.01)
    assert half[0].running_mean.dtype == torch.bfloat16


def test_averaged_weights_get_their_own_statistics() -> None:
    torch.manual_seed(1)
    model = Branches()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    data = batches((32,) * 4, shift=0.3)
    for _ in range(6):
        for x in data:
            optimizer.zero_grad()
            (model(x) - x.mean((1, 2, 3))[:, None]).square().mean().backward()
            optimizer.step()
        averaged.update_parameters(model)
    result = batchnorm.recalibrate(averaged, data, mode="sequential")
    found = inputs_of(averaged.module.eval(), data, lambda net, batch: net(batch))
    for name, layer in norms(averaged.module).items():
        close(layer, found[name].mean(0), found[name].var(0))
    assert len(result.layers) == 4
    assert result.layers[0].name.startswith("module.")


def test_the_same_bits_twice() -> None:
    first, data = Branches(), batches()
    second = copy.deepcopy(first)
    batchnorm.recalibrate(first, data)
    batchnorm.recalibrate(second, data)
    batchnorm.recalibrate(second, data)
    for one, other in zip(first.buffers(), second.buffers(), strict=True):
        assert same_bits(one, other)


def test_layers_frozen_by_freeze_stay_in_either_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    batchnorm.freeze(model[1], inplace=True)
    for mode in (True, False):
        result = batchnorm.recalibrate(model.train(mode), [torch.randn(8, 3) for _ in range(3)])
        assert [layer.name for layer in result.layers] == ["3"]
        assert result.skipped[0].reason == "frozen by freeze"
        assert model[1].running_mean.abs().max() == 0


def test_one_sample_says_nothing_about_the_next() -> None:
    result = batchnorm.recalibrate(nn.Sequential(nn.BatchNorm2d(2)), [torch.randn(1, 2, 5, 5)])
    assert result.precision == float("inf")
    assert "on 1 sample: " in str(result)
    assert "one sample: means not known" in str(result)


def test_a_dict_may_hold_more_than_the_forward_takes() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, image: Tensor) -> Tensor:
            out: Tensor = self.bn(image)
            return out

    model = Named()
    x = torch.randn(9, 3)
    batchnorm.recalibrate(model, [{"image": x, "label": torch.zeros(9)}])
    close(model.bn, x.double().mean(0), x.double().var(0))
