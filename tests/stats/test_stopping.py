"""When a pass may end, and what is said of the means it found."""

import pytest
import torch
from torch import Tensor, nn

import batchnorm

TOLERANCE = 0.1
NEEDED = (1.959964 / TOLERANCE) ** 2  # independent samples for ± 0.1 σ: 384


def stream(batches: int, kind: str, size: int = 8) -> list[Tensor]:
    """Images (N, 1, 4, 4) with mean 0 and variance 1."""
    n = batches * size
    if kind == "pixels":  # every pixel for itself
        x = torch.randn(n, 1, 4, 4)
    elif kind == "flat":  # all pixels of an image alike
        x = torch.randn(n, 1, 1, 1).expand(-1, 1, 4, 4)
    elif kind == "doubled":  # every image twice in a row
        x = torch.randn(n // 2, 1, 1, 1).repeat_interleave(2, 0).expand(-1, 1, 4, 4)
    else:  # sorted: 10 classes of their own means, one after the other
        x = torch.randn(10).repeat_interleave(n // 10).view(-1, 1, 1, 1) + 0.3 * torch.randn(
            n // 10 * 10, 1, 1, 1
        )
        x = x.expand(-1, 1, 4, 4)
    return list(x.split(size))


def recalibrated(
    data: list[Tensor], tolerance: float = TOLERANCE
) -> tuple[batchnorm.Recalibration, nn.BatchNorm2d]:
    model = nn.Sequential(nn.BatchNorm2d(1))
    return batchnorm.recalibrate(model, data, tolerance=tolerance), model[0]


@pytest.mark.parametrize(("kind", "factor"), [("pixels", 1 / 16), ("flat", 1), ("doubled", 2)])
def test_a_pass_ends_when_as_many_samples_are_seen_as_are_needed(kind: str, factor: float) -> None:
    taken = []
    for _ in range(12):
        result, _ = recalibrated(stream(400, kind))
        assert result.stopped_by == "tolerance"
        assert result.precision <= TOLERANCE
        taken.append(result.samples)
    needed = max(NEEDED * factor, 16 * 8)  # not before 16 batches
    assert needed * 0.8 < sum(taken) / len(taken) < needed * 2


@pytest.mark.parametrize("kind", ["pixels", "flat", "doubled"])
def test_the_interval_holds_the_true_mean_in_nineteen_of_twenty_runs(kind: str) -> None:
    runs, held = 200, 0
    for _ in range(runs):
        result, layer = recalibrated(stream(24, kind), tolerance=0)
        held += abs(layer.running_mean.item()) / layer.running_var.item() ** 0.5 <= result.precision
    assert 0.90 * runs <= held


def test_a_sorted_stream_is_taken_whole_and_told() -> None:
    for _ in range(10):
        result, _ = recalibrated(stream(400, "sorted"))
        assert (result.stopped_by, result.samples) == ("end", 3200)
        assert result.layers[0].design_effect > 20
        assert "sorted" in result.notes[0]
        assert "sequential" not in result.notes[0]  # one layer: nothing stands behind it


def test_a_shuffled_stream_is_not_called_sorted() -> None:
    for _ in range(30):
        result, _ = recalibrated(stream(64, "flat"), tolerance=0)
        assert result.notes == ()


def test_what_is_behind_the_first_layer_is_told_of_sorted_and_small_batches() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    assert "use mode='sequential'" in batchnorm.recalibrate(model, stream(100, "sorted")).notes[0]
    assert "batches of 8 samples" in batchnorm.recalibrate(model, stream(4, "pixels")).notes[0]
    assert batchnorm.recalibrate(model, stream(4, "pixels", 32)).notes == ()
    assert batchnorm.recalibrate(model, stream(4, "pixels"), mode="sequential").notes == ()


@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_samples_ends_the_pass_with_the_batch_that_reaches_it(mode: str) -> None:
    data = stream(10, "pixels")
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    result = batchnorm.recalibrate(model, data, samples=17, mode=mode)
    assert (result.samples, result.batches, result.stopped_by) == (24, 3, "samples")
    torch.testing.assert_close(model[0].running_mean, torch.cat(data[:3]).mean((0, 2, 3)))
    assert model[0].num_batches_tracked == 3
    assert batchnorm.recalibrate(model, data, samples=16, mode=mode).samples == 16
    more = batchnorm.recalibrate(model, data, samples=1000)
    assert (more.samples, more.stopped_by) == (80, "end")


def test_a_dead_channel_does_not_keep_the_pass_going() -> None:
    data = [torch.cat([x, torch.full_like(x, 3.0)], 1) for x in stream(400, "flat")]
    model = nn.Sequential(nn.BatchNorm2d(2))
    assert batchnorm.recalibrate(model, data, tolerance=TOLERANCE).stopped_by == "tolerance"
    assert model[0].running_var[1] == 0


def test_masked_samples_count_by_their_weight() -> None:
    # One sample of a thousand positions among samples of ten: the mean is hardly better known than by that one alone.
    layer = batchnorm.BatchNorm1d(1)
    x = torch.randn(64, 1, 1).expand(-1, 1, 1000)
    lengths = torch.tensor([1000] + [10] * 63)
    mask = torch.arange(1000) < lengths[:, None]
    model = nn.ModuleList([layer])
    result = batchnorm.recalibrate(
        model, [(x, mask)], forward=lambda net, batch: net[0](batch[0], mask=batch[1])
    )
    w = lengths.double()
    s = x[:, 0, 0].double()
    mean = (w * s).sum() / w.sum()
    sigma2 = (w * (s - mean).square()).sum() / w.sum() + layer.eps
    expected = 1.959964 * ((w.square() * (s - mean).square()).sum() / w.sum() ** 2 / sigma2).sqrt()
    assert result.precision == pytest.approx(expected.item(), rel=1e-6)
