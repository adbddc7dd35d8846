"""What `watch` finds while networks train: known mistakes by name, and nothing in healthy ones."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from model_packages import package
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from watch_helpers import conv_net, pictures, told, train

import batchnorm

BATCHES = [pictures(seed=seed) for seed in range(12)]


def codes(found: list[batchnorm.Finding], severity: str = "info") -> set[str]:
    worst = ("error", "warning", "info")
    return {each.code for each in found if worst.index(each.severity) <= worst.index(severity)}


def kinds(step: int, sort: bool) -> Tensor:
    """Pictures of three kinds, each brighter somewhere else; sorted, a batch has one kind."""
    kind = torch.full((16,), step // 4 % 3) if sort else torch.arange(16) % 3
    x = pictures(seed=step)
    x[torch.arange(16), 0, :, 2 * kind] += 2
    return x


def test_batches_that_are_sorted() -> None:
    (finding,) = told(conv_net(), [kinds(step, True) for step in range(24)], select="BN107")
    assert (finding.code, finding.severity, finding.module) == ("BN107", "warning", "")
    assert told(conv_net(), [kinds(step, False) for step in range(24)], select="BN107") == []
    # Glances at the input between two looks are what makes a few looks enough.
    assert codes(told(conv_net(), [kinds(step, True) for step in range(60)], every=16)) == {"BN107"}


def test_two_kinds_of_input_in_one_step() -> None:
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    found: list[batchnorm.Finding] = []
    with batchnorm.watch(model, optimizer=optimizer, every=1, table=False, on_finding=found.append):
        for x in BATCHES:
            model(x).square().mean().backward()
            model(5 * x + 3).square().mean().backward()
            optimizer.step()
    assert {"BN110", "BN111"} == codes(found)
    (each,) = (each for each in found if each.code == "BN110")
    assert "2 calls in a step" in each.message


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False)


def test_updates_in_backward() -> None:
    (finding,) = told(Checkpointed(), BATCHES[:3])
    assert (finding.code, finding.severity) == ("BN105", "warning")
    assert "2 updates of the running statistics in a step, 1 of them in backward" in finding.message


@pytest.mark.parametrize("reentrant", [False, True])
def test_updates_in_backward_of_a_part(reentrant: bool) -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> dict[str, Any]:
            hidden = checkpoint(lambda x: self.norm(self.first(x)), x, use_reentrant=reentrant)
            return {"out": [self.last(hidden), hidden.sum()]}

    model, found = Part(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with batchnorm.watch(model, optimizer=optimizer, every=1, table=False, on_finding=found.append):
        for _ in range(3):
            for _ in range(2):
                (out, extra) = model(torch.randn(32, 4, requires_grad=True))["out"]
                (out.square().mean() + extra).backward()
            optimizer.step()
    (message,) = (each.message for each in found if each.code == "BN105")
    assert message == "2 updates of the running statistics in a step, 1 of them in backward"


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, batchnorm.BatchNorm2d])
@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("by_optimizer", [False, True])
def test_a_forward_without_gradients_is_no_update_in_backward(
    norm: Any, part: bool, by_optimizer: bool
) -> None:
    """Of pseudo-labels, between forward and backward, of the model or of a part of it."""
    model, found = conv_net(norm), []
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    given = {"optimizer": optimizer} if by_optimizer else {}
    with batchnorm.watch(model, every=1, table=False, on_finding=found.append, **given):
        for x in BATCHES[:4]:
            loss = F.cross_entropy(model(x), torch.arange(16) % 3)
            with torch.no_grad():
                (model[:3] if part else model)(pictures(seed=20))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert found == []


def test_an_optimizer_that_does_not_step() -> None:
    model = conv_net(momentum=0.99)
    other = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.01)
    found: list[batchnorm.Finding] = []
    with batchnorm.watch(model, optimizer=other, every=1, table=False, on_finding=found.append) as watcher:
        train(model, [BATCHES[0]] * 200)
        assert len(watcher._looking._watch.notes["1"].calls["train"]) == 64
        assert (
            "the optimizer has not stepped in 200 forwards: pass the one that trains the model as optimizer="
            in watcher.findings.notes
        )
    # Of layers by themselves nothing is lost; calls without an end are not one step.
    assert [each.code for each in found] == ["BN004"]
    other = torch.optim.SGD(model.parameters(), 0.01)
    with batchnorm.watch(model, optimizer=other, every=1, table=False, on_finding=found.append) as watcher:
        train(model, [BATCHES[0]] * 70, other)
        assert not any("has not stepped" in note for note in watcher.findings.notes)


def test_a_nan_in_one_batch() -> None:
    bad = BATCHES[2].clone()
    bad[0, 0, 0, 0] = float("nan")
    found = told(conv_net(), [*BATCHES[:2], bad, *BATCHES[3:5]])
    assert codes(found, "error") == {"BN001"}


@pytest.mark.parametrize(("momentum", "expected"), [(0.99, {"BN004"}), (0.1, set())])
def test_momentum(momentum: float, expected: set[str]) -> None:
    assert codes(told(conv_net(momentum=momentum), BATCHES)) == expected


def test_frozen_weights_with_live_statistics() -> None:
    model = conv_net()
    for layer in (model[1], model[4]):
        layer.requires_grad_(False)
    (finding,) = told(model, BATCHES[:1])
    assert (finding.code, finding.severity) == ("BN010", "warning")


def test_few_values() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    (finding,) = told(model, torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0)))
    assert (finding.code, finding.severity) == ("BN103", "warning")


def test_padding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 8, 1), nn.BatchNorm1d(8), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    batches = torch.randn(3, 16, 4, 20)
    for x in batches:
        for row, length in enumerate(torch.randint(5, 20, (16,)).tolist()):
            x[row, :, length:] = 0
    (finding,) = told(model, batches)
    assert finding.code == "BN106"


@pytest.mark.parametrize("made", [torch.optim.SGD, torch.optim.AdamW])
def test_accumulated_gradients(made: Any) -> None:
    model = conv_net()
    optimizer = made(model.parameters(), 1e-3)
    found: list[batchnorm.Finding] = []
    with batchnorm.watch(model, optimizer=optimizer, every=1, table=False, on_finding=found.append):
        for _ in range(10):
            for x in BATCHES[:4]:
                model(x).square().mean().backward()
            optimizer.step()
    (finding,) = (each for each in found if each.code == "BN111")
    assert finding.evidence["times"] == 4
    assert ("BN014" in codes(found)) is (made is torch.optim.AdamW)


def test_a_raw_pixel_that_rarely_has_ink_is_no_finding() -> None:
    def batches() -> Iterator[Tensor]:
        for step in range(40):
            x = pictures(seed=step)
            x[:, 0, 0, 0] = 0
            x[0, 0, 0, 0] = float(step == 20)
            yield x

    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 3))
    assert codes(told(model, batches()), "warning") == set()


def test_a_channel_that_is_constant_within_batches() -> None:
    def batches() -> Iterator[Tensor]:
        for step in range(180):
            x = torch.randn(16, 4)
            if step > 20:
                x[:, 0] = float(step // 3 % 2)
            yield x

    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    (finding,) = told(model, batches(), every=10, select="BN108")
    assert "constant within each batch, and differ between batches" in finding.message


# How they are told


def test_a_finding_is_told_once_and_marked_when_it_is_gone(capsys: pytest.CaptureFixture[str]) -> None:
    model = conv_net(momentum=0.99)
    with batchnorm.watch(model, every=1, table=False) as watcher:
        train(model, BATCHES[:3])
        assert watcher.findings.notes == ()
        for layer in (model[1], model[4]):
            layer.momentum = 0.1
        train(model, BATCHES[3:6])
        findings = watcher.findings
    assert [each.code for each in findings] == ["BN004"]
    assert findings.notes == ("BN004 at 1 was last seen at step 3",)
    assert "BN004" in findings.ran
    assert findings.not_run["BN101"] == "batchnorm.check(model, batches=...)"
    assert findings.to_json()
    said = capsys.readouterr().err
    assert said.startswith("batchnorm, step 1: BN004 warning at 1, 4: momentum is 0.99: each batch replaces")
    assert said.count("\n") == 1


def test_what_wavers_is_told_at_the_second_look() -> None:
    model = Checkpointed()
    found: list[tuple[int, str]] = []
    with batchnorm.watch(
        model, every=1, table=False, on_finding=lambda finding: found.append((watcher.step, finding.code))
    ) as watcher:
        train(model, BATCHES[:2])
        assert found == []
        train(model, BATCHES[2:4])
    # The second step is judged when the third begins.
    assert found == [(2, "BN105")]


# Healthy networks


def regression(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(32, 10, generator=generator)
        yield x, (x[:, :3].prod(1) > 0).long()


def digits(steps: int, *, size: int = 8, channels: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    from sklearn.datasets import load_digits

    x, y = (torch.from_numpy(each) for each in load_digits(return_X_y=True))
    pictures = F.interpolate((x.float().view(-1, 1, 8, 8) - 5) / 6, size=size, mode="bilinear")
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(x), (16,), generator=generator)
        yield pictures[rows].expand(-1, channels, -1, -1), y[rows]


def assert_healthy(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], **options: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    found: list[batchnorm.Finding] = []
    with batchnorm.watch(model, table=False, on_finding=found.append, optimizer=optimizer, **options):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert [str(each) for each in found if each.severity != "info"] == []


@pytest.mark.slow
@pytest.mark.parametrize("every", [None, 1, 10])
def test_healthy_networks(every: int | None) -> None:
    torch.manual_seed(0)
    hidden = [[nn.Linear(n, 32), nn.BatchNorm1d(32), nn.ReLU()] for n in (10, 32)]
    assert_healthy(nn.Sequential(*itertools.chain(*hidden), nn.Linear(32, 2)), regression(300), every=every)
    stages = [[nn.Conv2d(n, 16, 3), nn.BatchNorm2d(16), nn.ReLU()] for n in (1, 16)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    assert_healthy(nn.Sequential(*itertools.chain(*stages), *head), digits(300), every=every)
    # The pixels of the border are always 0, and others nearly so.
    raw = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    assert_healthy(raw, digits(300), every=every)


@pytest.mark.packages
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_healthy_architectures(name: str) -> None:
    torch.manual_seed(0)
    model = package("torchvision.models").get_model(name, weights=None, num_classes=10)
    assert_healthy(model, digits(60, size=32, channels=3), every=2)


def test_what_is_left_of_the_start_of_a_running_variance_is_no_variance() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4))
    batches = torch.randn(3, 16, 4)
    batches[:, :, 0] = 0
    for _ in range(20):
        model(batches[0])
    assert len(batchnorm.check(model, batches=list(batches), select="BN108")) == 0
    model[0].running_var[0] += 0.1
    assert len(batchnorm.check(model, batches=list(batches), select="BN108")) == 1
