"""`adapt`: the statistics that each method normalizes with, and a model that is as it was afterwards."""

from typing import Any

import pytest
import torch
from stats_helpers import Branches, assert_same_state, norms, state
from torch import Tensor, nn

import batchnorm


def one(layer: nn.Module) -> nn.Module:
    layer.running_mean.copy_(torch.tensor([1.0, -2.0]))
    layer.running_var.copy_(torch.tensor([0.5, 4.0]))
    return nn.Sequential(layer)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    flat = x.double().transpose(0, 1).flatten(1)
    return flat.mean(1), flat.var(1, correction=0)


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize(
    ("method", "prior"), [("batch", 99.0), ("blend", 16.0), ("blend", 0.0), ("blend", 3.5)]
)
def test_the_formula(ours: bool, method: Any, prior: float) -> None:
    model = one((batchnorm.BatchNorm2d if ours else nn.BatchNorm2d)(2))
    x = torch.randn(24, 2, 3, 3) * 3 + 5
    with batchnorm.adapt(model, method, prior=prior) as adapted:
        y = adapted(x)
    old = 0.0 if method == "batch" else prior
    mean, var = moments(x)
    mean = (old * torch.tensor([1.0, -2.0]).double() + 24 * mean) / (old + 24)
    var = (old * torch.tensor([0.5, 4.0]).double() + 24 * var) / (old + 24)
    expected = (x.double() - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + 1e-5).sqrt()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_each_batch_stands_for_itself_against_the_source() -> None:
    model, x = one(nn.BatchNorm1d(2)), torch.randn(32, 2)
    with batchnorm.adapt(model, prior=8) as adapted:
        first = adapted(x)
        adapted(x * 100)
        assert torch.equal(adapted(x), first)


@pytest.mark.parametrize("method", ["batch", "blend", "tent"])
@pytest.mark.parametrize("end", ["end", "error"])
def test_the_model_is_as_it_was(method: Any, end: str) -> None:
    model = Branches().train()
    model.left.eval()
    model.head.weight.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    before = state(model)
    gradients = [
        (p.requires_grad, p.grad, p.grad.clone() if p.grad is not None else None) for p in model.parameters()
    ]
    try:
        with batchnorm.adapt(model, method) as adapted:
            for _ in range(3):
                y = adapted(torch.randn(16, 2, 6, 6))
                assert not y.requires_grad
            if end == "error":
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert end == "error"
    assert_same_state(model, before)
    for parameter, (wanted, gradient, value) in zip(model.parameters(), gradients, strict=True):
        assert parameter.requires_grad == wanted
        assert parameter.grad is gradient
        assert gradient is None or torch.equal(gradient, value)
    with pytest.raises(batchnorm.ModelError, match="after the block has ended"):
        adapted(torch.randn(16, 2, 6, 6))


def test_tent_is_the_paper_s_loop() -> None:
    torch.manual_seed(3)
    model, other = Branches(), Branches()
    other.load_state_dict(model.state_dict())
    data = [torch.randn(16, 2, 6, 6) + 1 for _ in range(4)]
    other.eval().requires_grad_(False)
    trained = []
    for layer in norms(other).values():
        layer.train()
        trained += [layer.weight.requires_grad_(), layer.bias.requires_grad_()]
    optimizer = torch.optim.Adam(trained, 0.01)
    with batchnorm.adapt(model, "tent", lr=0.01) as adapted:
        for x in data:
            y = other(x)
            p = y.softmax(1)
            optimizer.zero_grad()
            (-(p * p.log()).sum(1).mean()).backward()
            optimizer.step()
            torch.testing.assert_close(adapted(x), y.detach(), rtol=1e-5, atol=1e-6)
        assert not torch.equal(model.last.weight, torch.ones(5))
    assert torch.equal(model.last.weight, torch.ones(5))


def test_tent_lowers_the_entropy() -> None:
    model, x = Branches(), torch.randn(64, 2, 6, 6)
    with batchnorm.adapt(model, "tent", lr=0.05) as adapted:
        entropies = []
        for _ in range(20):
            p = adapted(x).softmax(1)
            entropies.append(-(p * p.log()).sum(1).mean().item())
    assert entropies[-1] < entropies[0] - 0.05


def test_few_samples() -> None:
    model = Branches()
    for method in ("batch", "tent"):
        with batchnorm.adapt(model, method) as adapted:
            with pytest.raises(batchnorm.DataError, match=r"a batch of one sample.*blend"):
                adapted(torch.randn(1, 2, 6, 6))
            with pytest.warns(UserWarning, match="statistics of 15 samples are noise") as told:
                adapted(torch.randn(15, 2, 6, 6))
            assert told[0].filename == __file__
            adapted(torch.randn(15, 2, 6, 6))  # said once
    with batchnorm.adapt(model, "blend") as adapted:
        adapted(torch.randn(1, 2, 6, 6))


def test_a_sorted_stream_is_told_and_a_shuffled_one_is_not() -> None:
    model = Branches()
    classes = torch.randn(10, 2, 1, 1) * 2
    label = torch.arange(10).repeat_interleave(64)
    x = classes[label] + torch.randn(640, 2, 6, 6)
    with batchnorm.adapt(model, "batch") as adapted:
        parts = x.split(32)
        for part in parts[:7]:
            adapted(part)
        with pytest.warns(UserWarning, match="The stream is sorted"):
            adapted(parts[7])
        for part in parts[8:]:
            adapted(part)  # said once
    assert adapted.design_effect > 4
    for seed in range(5):
        order = torch.randperm(640, generator=torch.Generator().manual_seed(seed))
        with batchnorm.adapt(model, "batch") as adapted:
            for part in x[order].split(32):
                adapted(part)
        assert adapted.design_effect < 4


def test_frozen_layers_take_no_part() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).train()
    model[0].eval()
    model[0].running_mean.fill_(3.0)
    x = torch.randn(32, 2) * 2
    with batchnorm.adapt(model, "batch") as adapted:
        hooks = [len(layer._forward_pre_hooks) for layer in model]
        adapted(x)
    assert hooks == [0, 1]


@pytest.mark.parametrize(
    ("model", "options", "error", "text"),
    [
        (3, {}, batchnorm.InputTypeError, "adapt: model: got int"),
        (nn.Linear(1, 1), {}, batchnorm.ModelError, "got none"),
        (nn.BatchNorm1d(2), {"method": "best"}, batchnorm.InputError, "method: got 'best'"),
        (nn.BatchNorm1d(2), {"prior": -1}, batchnorm.InputError, "prior: got -1"),
        (nn.BatchNorm1d(2), {"prior": "1"}, batchnorm.InputTypeError, "prior: got str"),
        (nn.BatchNorm1d(2), {"lr": float("inf")}, batchnorm.InputError, "lr: got inf"),
        (nn.BatchNorm1d(2, affine=False), {"method": "tent"}, batchnorm.ModelError, "no batch norm with γ"),
        (nn.BatchNorm1d(2), {"optimizer": 0.1}, batchnorm.InputTypeError, "optimizer: got float"),
    ],
)
def test_refused_at_the_call(model: Any, options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        batchnorm.adapt(model, **options)


def test_who_takes_part_is_seen_when_the_block_begins() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).train()
    block = batchnorm.adapt(model, "batch")
    assert not model[0]._forward_pre_hooks
    model[0].eval()  # frozen, in a model in training mode
    with block:
        assert [len(layer._forward_pre_hooks) for layer in model] == [0, 1]


def test_it_says_what_it_is() -> None:
    model = Branches()
    with batchnorm.adapt(model, "blend", prior=2.5) as adapted:
        assert repr(adapted) == "Adapted(Branches, 'blend', prior=2.5: 0 batches)"
        adapted(torch.randn(16, 2, 6, 6))
        assert repr(adapted) == "Adapted(Branches, 'blend', prior=2.5: 1 batch)"
    with batchnorm.adapt(model, "batch") as adapted:
        for _ in range(8):
            adapted(torch.randn(16, 2, 6, 6))
    assert (
        repr(adapted)
        == f"Adapted(Branches, 'batch': 8 batches, design effect {adapted.design_effect:.2g}, ended)"
    )


def test_without_a_block_and_block_after_block() -> None:
    model, x = Branches(), torch.randn(16, 2, 6, 6)
    blocks = batchnorm.adapt(model)
    with pytest.raises(batchnorm.ModelError, match=r"got a call without a block.*with batchnorm.adapt"):
        blocks(x)
    before = state(model)
    with blocks as first:
        expected = first(x)
    with blocks as second:
        assert torch.equal(second(x), expected)
    assert second is not first
    assert_same_state(model, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_tent_needs_logits() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2))
    before = state(model)
    with (
        pytest.raises(batchnorm.DataError, match="expected logits"),
        batchnorm.adapt(model, "tent") as adapted,
    ):
        adapted(torch.randn(16, 2, 3, 3))
    assert_same_state(model, before)
