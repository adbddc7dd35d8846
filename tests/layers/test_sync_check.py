"""check_sync with two and three processes on gloo: each mistake ends in an error on every process, in time."""

from typing import Any

import pytest
import torch
from sync_tasks import TIMEOUT
from sync_worker import together
from torch import nn

import batchnorm

# Seconds beyond a time-out, on a machine with more to do; a hang would take gloo's minute.
PATIENCE = 10.0


@pytest.fixture(
    scope="module",
    params=[2, pytest.param(3, marks=pytest.mark.slow)],
    ids=lambda world: f"{world} processes",
)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(request.param, tmp_path_factory.mktemp("check"), task="mistakes")


def ranks(results: list[dict[str, Any]]) -> str:
    return "rank 0" if len(results) == 2 else "ranks 0, 2"


def test_nothing_is_wrong_with_what_is_right(results: list[dict[str, Any]]) -> None:
    assert [result["fine"]["error"] for result in results] == [""] * len(results)


@pytest.mark.parametrize(
    ("name", "theirs", "its"),
    [
        ("eval layer", "'bn2' in forward", "'bn3' in forward"),
        ("swapped", "'bn2' in forward", "'bn3' in forward"),
        ("backward", "'bn1' in backward", "'bn2' in backward"),
    ],
)
def test_another_layer_than_the_others(
    results: list[dict[str, Any]], name: str, theirs: str, its: str
) -> None:
    after = ", after a call of 'bn2' in eval mode" if name == "eval layer" else ""
    for result in results:
        assert result[name]["error"].startswith(
            f"SyncBatchNorm: got {ranks(results)}: {theirs} with 3 channels (call 1, float32); rank 1: {its} with 3 "
            f"channels (call 1, float32){after}, expected the same on every process. Every process of the group must"
        )
        assert result[name]["seconds"] < PATIENCE  # at once, not after the 30 s of the time-out


@pytest.mark.parametrize(
    ("name", "layer", "whereabouts"),
    [
        ("eval model", "bn1", "has called 'bn1', 'bn2', 'bn3' in eval mode"),
        ("late", "bn1", "has called none of these layers"),
        ("fails", "bn2", "has left check_sync after ValueError"),
    ],
)
def test_a_process_that_does_not_come(
    results: list[dict[str, Any]], name: str, layer: str, whereabouts: str
) -> None:
    timeout = TIMEOUT[len(results)]
    for rank, result in enumerate(results):
        if rank != 1:
            assert result[name]["error"].startswith(
                f"SyncBatchNorm '{layer}' in forward with 3 channels (call 1, float32): got no rank 1 within "
                f"{timeout:g} s (rank 1 {whereabouts}), expected all of ranks 0, 1"
            )
            assert timeout <= result[name]["seconds"] < timeout + PATIENCE
    assert results[1]["eval model"]["error"] == ""
    assert results[1]["fails"]["error"] == "ValueError('a bad image')"
    # Who comes after the others have given up must not wait for them in the exchange.
    assert f"got rank 1 after others had waited {timeout:g} s and given up" in results[1]["late"]["error"]


def test_a_group_of_some(results: list[dict[str, Any]]) -> None:
    last, timeout = len(results) - 1, TIMEOUT[len(results)]
    assert f"got no rank {last} within {timeout:g} s" in results[0]["group"]["error"]
    assert f"expected all of ranks 0, {last}." in results[0]["group"]["error"]
    assert not any(result["group"]["error"] for result in results[1:])


def test_without_other_processes_there_is_nothing_to_check() -> None:
    model = nn.Sequential(batchnorm.SyncBatchNorm(3))
    with batchnorm.check_sync(model):
        model(torch.randn(4, 3))
    with (
        pytest.raises(batchnorm.InputError, match=r"got one without batchnorm\.SyncBatchNorm"),
        batchnorm.check_sync(nn.Sequential(nn.SyncBatchNorm(3))),
    ):
        pass
    for timeout in (0, -1.0, float("nan")):
        with pytest.raises(batchnorm.InputError, match="timeout"), batchnorm.check_sync(model, timeout):
            pass
    with pytest.raises(batchnorm.InputTypeError, match="got str"), batchnorm.check_sync("model"):
        pass
