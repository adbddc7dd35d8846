"""The kernels through the layers: very many channels and positions, workers of a DataLoader, threads."""

import threading
from typing import Any

import pytest
import torch
from helpers import EXACT, error, oracle, same_bits
from torch import Tensor

import batchnorm
from batchnorm.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())


def held(x: Tensor, mask: Tensor | None, bound: float) -> None:
    """Assert that a training step on the kernels is within `bound` of the truth."""
    dy = torch.randn(x.shape)
    weight, bias = torch.rand(2, x.shape[1]) + 0.5
    leaves = [value.requires_grad_() for value in (x, weight, bias)]
    y = batchnorm.batch_norm(
        leaves[0], None, None, *leaves[1:], training=True, activation="relu", mask=mask, backend="cpu"
    )
    gradients = torch.autograd.grad(y, leaves, dy)
    truth = oracle(x, dy, weight=weight, bias=bias, mask=mask, activation="relu")
    expected = (truth.output, truth.grad_input, truth.grad_weight, truth.grad_bias)
    for mine, other in zip((y, *gradients), expected, strict=True):
        assert error(mine, other) <= bound


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "mask"])
@pytest.mark.parametrize("shape", [(12, 100_000), (3, 100_000, 2)], ids=str)
def test_a_hundred_thousand_channels(shape: tuple[int, ...], masked: bool) -> None:
    mask = torch.arange(shape[0]) % 5 != 1 if masked else None
    if mask is not None and len(shape) == 3:
        mask = mask.unsqueeze(1)
    held(torch.randn(shape) * 3 + 1, mask, EXACT[torch.float32])


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "mask"])
def test_ten_million_positions(masked: bool) -> None:
    x = torch.randn(1, 2, 10**7) + 100
    held(x, torch.rand(10**7) < 0.7 if masked else None, EXACT[torch.float32])


class Normalized(torch.utils.data.Dataset):
    """What a layer makes of a batch in training, with and without a mask, and in eval mode; made in the worker."""

    def __init__(self) -> None:
        self.x = torch.randn(6, 64, 8, 150)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> list[Tensor]:
        layer, x = batchnorm.BatchNorm1d(8, activation="relu", backend="cpu"), self.x[index]
        with torch.no_grad():
            return [layer(x), layer(x, mask=torch.arange(150) < 100), layer.eval()(x)]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_of_a_dataloader() -> None:
    data = Normalized()
    own = [data[index] for index in range(len(data))]  # and now the parent has its threads
    loader: Any = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for mine, expected in zip(loader, own, strict=True):
        assert all(map(same_bits, mine, expected))


def test_layers_in_several_threads() -> None:
    torch.manual_seed(0)
    layers = [batchnorm.BatchNorm1d(33, activation="relu", backend="cpu") for _ in range(4)]
    x, dy = torch.randn(2, 64, 33, 50)
    mask = torch.arange(50) < 40

    def step(layer: torch.nn.Module) -> list[Tensor]:
        a = x.clone().requires_grad_()
        y = layer(a, mask=mask) + layer(a)
        gradients = torch.autograd.grad(y, [a, *layer.parameters()], dy)
        return [y.detach(), *gradients]

    alone = step(batchnorm.BatchNorm1d(33, activation="relu", backend="cpu"))
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(10):
            if not all(map(same_bits, step(layers[index]), alone)):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for layer in layers[1:]:
        assert all(map(same_bits, layer.state_dict().values(), layers[0].state_dict().values()))
