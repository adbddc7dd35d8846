"""BN107 by labels: how many classes a batch holds against chance, and the model's own input."""

from typing import Any

import pytest
import torch
from rule_helpers import found, only
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from batchnorm.checks.variety import variety

CLASSES, COUNT = 10, 640


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6))


def data(labels: Tensor) -> TensorDataset:
    """Inputs that say nothing of the labels."""
    torch.manual_seed(1)
    return TensorDataset(torch.randn(len(labels), 4), labels)


SORTED = torch.arange(COUNT) * CLASSES // COUNT


def test_sorted_by_class_while_the_inputs_do_not_show_it() -> None:
    batches = list(DataLoader(data(SORTED), 32))
    finding = only(net(), "BN107", batches=batches, max_batches=20)
    assert (finding.severity, finding.module) == ("warning", "")
    assert finding.message == "batches hold 1.0 of 10 classes on average, 9.7 by chance (20 batches)"
    assert finding.evidence["variety"] == 0
    # Two batches are enough, one is not, and one class alone says nothing.
    assert found(net(), "BN107", batches=batches[1:3])
    assert found(net(), "BN107", batches=batches[:1]) == ()
    assert found(net(), "BN107", batches=batches[:2]) == ()


def test_a_sorted_dataset_whose_first_batches_are_of_one_class() -> None:
    class Folder(TensorDataset):
        @property
        def targets(self) -> list[int]:
            return SORTED.tolist()

    for dataset in (data(SORTED), Folder(*data(SORTED).tensors)):
        finding = only(net(), "BN107", batches=DataLoader(dataset, 32), max_batches=2)
        assert "1.0 of 10 classes" in finding.message
        assert "(20 batches)" in finding.message
    # The loader's own order counts, and the labels that it gives.
    assert found(net(), "BN107", batches=DataLoader(dataset, 32, shuffle=True), max_batches=2) == ()
    other = DataLoader(
        data(SORTED), 32, collate_fn=lambda rows: (torch.stack([x for x, _ in rows]), _thirds(rows))
    )
    assert found(net(), "BN107", batches=other, max_batches=2) == ()


def _thirds(rows: Any) -> Tensor:
    return torch.arange(len(rows)) % 3


def test_a_few_classes_are_in_every_batch() -> None:
    labels = torch.cat([torch.tensor([kind] * 31 + [1 - kind]) for kind in (0, 1) * 4])
    finding = only(net(), "BN107", batches=DataLoader(data(labels), 32))
    assert finding.message.startswith("two samples of a batch have different labels 0.1")


def test_inputs_that_scatter_where_a_layer_does_not_see_it() -> None:
    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x - x.mean(1, keepdim=True))

    apart = [torch.randn(32, 4) + 3 * torch.randn(1, 1) for _ in range(8)]
    assert only(Deaf(), "BN107", batches=apart).module == ""
    # Inputs of other lengths are not compared.
    lengths = [torch.randn(32, 2, 5 + index).cumsum(2) + 3 * index for index in range(8)]

    class Any(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x[:, :, 1:2] - x[:, :, :1])

    assert found(Any(), "BN107", batches=lengths) == ()


def healthy(name: str) -> Any:
    torch.manual_seed(2)
    dataset, order = data(SORTED), torch.randperm(COUNT)
    rare = (torch.arange(COUNT) % 50 == 0).long()
    stratified = SORTED.view(CLASSES, -1).T.reshape(-1)
    x = torch.randn(COUNT, 4)
    return {
        "shuffled": lambda: DataLoader(dataset, 32, shuffle=True),
        "shuffled on disk": lambda: DataLoader(data(SORTED[order]), 32),
        "stratified": lambda: DataLoader(data(stratified), 32),
        "balanced": lambda: DataLoader(
            data(rare), 32, sampler=WeightedRandomSampler(0.02 + rare.double(), COUNT)
        ),
        "rare": lambda: DataLoader(data(rare[order]), 32),
        "two classes of ten": lambda: DataLoader(dataset, 32, sampler=SubsetRandomSampler(range(128))),
        "sampled": lambda: DataLoader(dataset, 32, sampler=RandomSampler(dataset)),
        "regression": lambda: DataLoader(TensorDataset(x, SORTED.float()), 32),
        "one axis more": lambda: DataLoader(TensorDataset(x, SORTED[:, None]), 32),
        "masks": lambda: DataLoader(TensorDataset(x, SORTED[:, None, None].expand(-1, 8, 8)), 32),
        "tokens": lambda: DataLoader(TensorDataset(x, SORTED[:, None].expand(-1, 12)), 32),
        "numbers of samples": lambda: DataLoader(TensorDataset(x, torch.arange(COUNT) // 2 * 2 + 5), 32),
        "four people a batch": lambda: [
            (torch.randn(32, 4), torch.randperm(40)[:4].repeat_interleave(8)) for _ in range(20)
        ],
        "three parts": lambda: [(torch.randn(32, 4), SORTED[:32] + i, SORTED[:32]) for i in range(8)],
    }[name]()


@pytest.mark.parametrize(
    "name",
    [
        "shuffled",
        "shuffled on disk",
        "stratified",
        "balanced",
        "rare",
        "two classes of ten",
        "sampled",
        "regression",
        "one axis more",
        "masks",
        "tokens",
        "numbers of samples",
        "four people a batch",
        "three parts",
    ],
)
def test_healthy_loaders(name: str) -> None:
    assert found(net(), "BN107", batches=healthy(name)) == ()


def test_no_chance_deal_is_sure() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        classes = int(torch.randint(2, 12, (1,), generator=generator))
        size, batches = (int(torch.randint(2, 20, (1,), generator=generator)) for _ in range(2))
        labels = (torch.rand(batches, size, generator=generator) ** 2 * classes).long()
        measured = variety(torch.stack([row.bincount(minlength=classes) for row in labels]), 0.7)
        assert measured is None or not measured.sure


def test_the_expectations_are_those_of_random_deals() -> None:
    counts = torch.tensor([[8, 0], [0, 8], [8, 0], [0, 8]])
    measured = variety(counts)
    assert measured is not None
    assert (measured.held, measured.share) == (1.0, 0.0)
    # Of 8 of 32 with 16 of each class: one class is not there with 2 · C(16, 8) / C(32, 8).
    assert measured.chance == pytest.approx(2 - 2 * 12870 / 10518300, abs=0.02)
    assert variety(torch.tensor([[4, 4]] * 4), 1.0) is None
