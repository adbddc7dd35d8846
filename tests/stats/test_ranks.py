"""Two processes on gloo, with uneven and empty shares of the data, against one process that has it all."""

from pathlib import Path
from types import ModuleType
from typing import Any

import processes
import pytest
import torch
from helpers import same_bits

import batchnorm

WORKER = Path(__file__).with_name("rank_worker.py")


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    return processes.load(WORKER)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    processes.together(WORKER, 2, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("mode", ["joint", "sequential"])
@pytest.mark.parametrize("case", ["uneven", "empty", "many"])
def test_shares_give_what_the_whole_gives(
    worker: ModuleType, results: list[dict[str, Any]], case: str, mode: str
) -> None:
    model = worker.network()
    whole = [*worker.batches(case, 0), *worker.batches(case, 1)]
    result = batchnorm.recalibrate(model, whole, mode=mode, tolerance=0)
    (first, told), (second, told_too) = (found[f"{case} {mode}"] for found in results)
    assert told == told_too  # the precision too: on it depends who stops
    assert told["samples"] == result.samples == sum(map(len, whole))
    assert (told["batches"], told["passes"]) == (len(whole), result.passes)
    for name, value in model.state_dict().items():
        assert same_bits(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6)


def test_samples_and_tolerance_are_counted_over_both(results: list[dict[str, Any]]) -> None:
    for case, stopped_by in (("samples", "samples"), ("tolerance", "tolerance")):
        (first, told), (second, told_too) = (found[case] for found in results)
        assert told["stopped_by"] == told_too["stopped_by"] == stopped_by
        assert told["samples"] == told_too["samples"]
        for name, value in first.items():
            assert same_bits(value, second[name]), name
    assert results[0]["samples"][1]["samples"] == 112
    assert results[0]["tolerance"][1]["precision"] <= 0.05


def test_without_a_group_each_is_alone(worker: ModuleType, results: list[dict[str, Any]]) -> None:
    for rank in range(2):
        model = worker.network()
        batchnorm.recalibrate(model, worker.batches("uneven", rank))
        for name, value in model.state_dict().items():
            assert same_bits(results[rank]["alone"][0][name], value), name


def test_a_wrapped_model_needs_no_even_shares(results: list[dict[str, Any]]) -> None:
    for found in results:
        for name, value in found["wrapped"][0].items():
            assert same_bits(value, found["uneven joint"][0][name]), name


def test_a_process_that_fails_takes_the_other_along(results: list[dict[str, Any]]) -> None:
    (text, unchanged), (text_too, unchanged_too) = (found["failed"] for found in results)
    assert "another process stopped" in text
    assert "got a str" in text_too
    assert unchanged
    assert unchanged_too


def test_different_models_are_refused_on_both(results: list[dict[str, Any]]) -> None:
    for found in results:
        assert "differ from process to process" in found["different"]
