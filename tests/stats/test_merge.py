"""`merge_statistics` against the statistics of all the data put together."""

from typing import Any

import pytest
import torch
from helpers import same_bits
from torch import Tensor, nn

import batchnorm

SIZES = (40, 7, 3)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3, momentum=None))


def shares() -> list[Tensor]:
    return [torch.randn(size, 2, 5) * (k + 1) + 10 * k for k, size in enumerate(SIZES)]


def clients(data: list[Tensor] | None = None) -> list[dict[str, Any]]:
    found = []
    for x in data or shares():
        model = network()
        model(x)
        found.append(model.state_dict())
    return found


@pytest.mark.parametrize("given", ["numbers", "by layer"])
def test_the_statistics_are_those_of_all_the_data(given: str) -> None:
    data, whole = shares(), network()
    states = clients(data)
    copies = [{name: value.clone() for name, value in state.items()} for state in states]
    values = [5.0 * size for size in SIZES]
    counts: list[Any] = [{"1": n} for n in values] if given == "by layer" else values
    merged = batchnorm.merge_statistics(states, counts)
    y = whole[0](torch.cat(data)).detach().double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(merged["1.running_mean"].double(), y.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged["1.running_var"].double(), y.var(1), rtol=1e-5, atol=1e-5)
    assert merged["1.num_batches_tracked"] == 3
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        assert same_bits(merged[name], states[0][name]), name  # equal weights stay
    for state, old in zip(states, copies, strict=True):
        assert all(same_bits(state[name], old[name]) for name in old)
    whole.load_state_dict(merged)
    assert list(merged) == list(states[0])


def test_weights_are_averaged_by_count_and_other_integers_kept() -> None:
    states = [
        {"w": torch.tensor([1.0, 2.0]), "index": torch.tensor([3]), "note": "a"},
        {"w": torch.tensor([5.0, 2.0]), "index": torch.tensor([3]), "note": "a"},
    ]
    merged = batchnorm.merge_statistics(states, [1, 3])
    assert merged["w"].tolist() == [4.0, 2.0]
    assert (merged["index"].tolist(), merged["note"]) == ([3], "a")
    assert merged["index"] is not states[0]["index"]
    states[1]["index"] = torch.tensor([4])
    with pytest.raises(batchnorm.ModelError, match="index: got values that differ"):
        batchnorm.merge_statistics(states, [1, 3])


def test_a_client_without_data_counts_for_nothing() -> None:
    states = clients()
    poisoned = {name: torch.full_like(value, -1) for name, value in states[0].items()}
    for name in ("1.running_mean", "1.running_var", "0.weight"):
        poisoned[name] = torch.full_like(states[0][name], float("nan"))
    merged = batchnorm.merge_statistics([states[0], poisoned, states[1]], [9, 0, 4])
    expected = batchnorm.merge_statistics([states[0], states[1]], [9, 4])
    for name, value in expected.items():
        assert same_bits(merged[name], value), name


def test_a_large_offset_and_half_buffers() -> None:
    states = [
        {
            "running_mean": torch.tensor([1e8 + k], dtype=torch.float64),
            "running_var": torch.tensor([1.0]).double(),
        }
        for k in (0, 2)
    ]
    merged = batchnorm.merge_statistics(states, [10, 10])
    torch.testing.assert_close(merged["running_var"].item(), (9 + 9 + 20) / 19, rtol=1e-12, atol=0)
    half = [{name: value.bfloat16() for name, value in state.items()} for state in states]
    assert batchnorm.merge_statistics(half, [10, 10])["running_mean"].dtype == torch.bfloat16


def test_one_value_in_all_leaves_the_variance() -> None:
    state = {"running_mean": torch.tensor([2.0]), "running_var": torch.tensor([3.0])}
    merged = batchnorm.merge_statistics([state], [1])
    assert (merged["running_mean"].item(), merged["running_var"].item()) == (2.0, 3.0)


@pytest.mark.parametrize(
    ("change", "counts", "error", "text"),
    [
        (None, [1, 2], batchnorm.InputError, "2 for 3 state dicts"),
        (None, [0, 0, 0], batchnorm.InputError, "0 for all"),
        (None, [1, -2, 1], batchnorm.InputError, "got -2"),
        (None, [1, float("nan"), 1], batchnorm.InputError, "got nan"),
        (None, 3, batchnorm.InputTypeError, "counts: got a int, expected a list"),
        (None, torch.ones(3), batchnorm.InputTypeError, r"got a Tensor.*counts\.tolist"),
        (None, ["1", 1, 1], batchnorm.InputTypeError, "a str"),
        (None, [{}, 1, 1], batchnorm.InputError, "none for 1"),
        (lambda s: s[1].pop("0.bias"), [1, 1, 1], batchnorm.ModelError, "state dict 1: got no 0.bias"),
        (lambda s: s[2].update(more=1), [1, 1, 1], batchnorm.ModelError, "more, which state dict 0 has not"),
        (lambda s: s[2].update({"0.bias": torch.zeros(9)}), [1] * 3, batchnorm.ModelError, r"shape \(9,\)"),
        (lambda s: s.__setitem__(1, network()), [1, 1, 1], batchnorm.InputTypeError, "got a Sequential"),
        (lambda s: s.clear(), [], batchnorm.InputError, "state_dicts: got none"),
    ],
)
def test_refused(change: Any, counts: Any, error: type[Exception], text: str) -> None:
    states: list[Any] = clients()
    if change is not None:
        change(states)
    with pytest.raises(error, match=text):
        batchnorm.merge_statistics(states, counts)


def test_counts_for_a_layer_that_is_not_there_are_refused() -> None:
    state = nn.Sequential(nn.BatchNorm1d(2)).state_dict()
    with pytest.raises(
        batchnorm.InputError, match=r"counts: got '1', expected the names of batch norm layers: 0"
    ):
        batchnorm.merge_statistics([state, state], [{"0": 3, "1": 4}, {"0": 2}])
