"""`compare` end to end on small runs."""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm
from batchnorm.comparison import Comparison, Silent
from batchnorm.comparison.measures import rms
from batchnorm.report.document import Figure, Paragraph, Table, Verdict

Arrays = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def data() -> Arrays:
    """Three noisy rings in four dimensions: learnable, not linearly."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(240, 4, generator=generator)
    y = torch.bucketize(x.norm(dim=1), torch.tensor([1.5, 2.2]))
    return x[:160], y[:160], x[160:], y[160:]


def small(data: Any, model: Any = "deep-mlp", **options: Any) -> Comparison:
    settings: dict[str, Any] = {"lrs": [0.03, 0.1], "seeds": 2, "steps": 30, "batch_size": 32, **options}
    return batchnorm.compare(model, data, **settings)


@pytest.fixture(scope="module")
def result(data: Arrays) -> Comparison:
    return small(data)


def plain_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def normalized_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


class Stop(Silent):
    """Ctrl-C when so many trainings are finished and another has made a step."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.finished = 0
        self.ended = False

    def step(self, step: int, steps: int, loss: float, score: float | None) -> None:
        if self.finished == self.after:
            raise KeyboardInterrupt

    def run_finished(
        self, label: str, normalized: bool, lr: float, seed: int, final_score: float, diverged: bool
    ) -> None:
        self.finished += 1

    def finish(self) -> None:
        self.ended = True


def test_every_pair_is_trained_and_recorded(result: Comparison) -> None:
    assert [(run.seed, run.lr, run.normalized) for run in result.runs] == [
        (seed, lr, normalized) for seed in (0, 1) for lr in (0.03, 0.1) for normalized in (False, True)
    ]
    for run in result.runs:
        assert run.steps == tuple(range(31))
        assert len(run.score) == len(run.loss) == 31
        assert all(0 <= value <= 1 for value in run.score)
        assert run.trained_steps == 30
        assert run.loss[-1] < run.loss[1]
    assert result.setup.how == "insert"
    assert result.setup.layers == 10


def test_json_has_the_documented_shape_and_the_numbers_of_the_runs(result: Comparison) -> None:
    found = json.loads(result.to_json())
    assert (found["kind"], found["schema_version"]) == ("comparison", 2)
    assert set(found) == {
        *("kind", "schema_version", "verdict", "verdicts", "interrupted", "error", "setup"),
        *("summary", "footing", "dynamics", "runs", "notes", "facts"),
    }
    assert set(found["setup"]) == {
        *("model", "task", "data", "describe", "samples", "how", "layers", "parameters", "optimizer"),
        *("lrs", "seeds", "steps", "batch_size", "every", "device"),
    }
    assert set(found["summary"]) == {
        *("seeds", "task", "chance", "plain", "normalized", "rate_differences"),
        *("best_difference", "final_difference", "targets", "seconds_per_step"),
    }
    assert set(found["runs"][0]) == {
        *("normalized", "lr", "seed", "steps", "score", "loss", "diverged", "trained_steps", "seconds"),
    }
    assert found["runs"][0]["loss"][0] is None
    assert found["runs"][3]["score"] == list(result.runs[3].score)
    assert (found["interrupted"], found["error"]) == (False, "")
    finals = [run.score[-1] for run in result.runs if not run.normalized and run.lr == 0.1]
    assert found["summary"]["plain"]["rates"][1]["final"]["mean"] == pytest.approx(np.mean(finals))


def test_same_seed_same_numbers(data: Arrays, result: Comparison) -> None:
    torch.manual_seed(99)
    again = small(data)
    assert again.runs == result.runs
    assert again.summary == result.summary
    assert again.footing == result.footing


def test_the_seeds_differ(result: Comparison) -> None:
    first, second = (
        [run.loss[1:] for run in result.runs if run.seed == seed and not run.normalized] for seed in (0, 1)
    )
    assert first != second


def test_global_random_state_threads_and_data_are_left_alone(data: Arrays) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    copies = [part.clone() for part in data]
    torch.set_num_threads(2)
    try:
        found = small(data, lrs=[0.1], seeds=1, steps=3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert found.facts["threads"] == "1"
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
    assert all(torch.equal(old, new) for old, new in zip(copies, data, strict=True))


def test_batch_statistics_are_those_of_batch_norm(result: Comparison) -> None:
    found = result.footing
    assert found is not None
    assert found.place.startswith("batch norm 6 of 10")
    assert (found.batches, found.values, found.channels) == (5, 32, 100)
    assert found.after.mean < 1e-5
    assert found.after.spread < 1e-2
    assert found.before.spread > 0.03
    assert found.without is not None
    assert found.without.mean > 0.03
    shown = [point[0] for point in found.before.points]
    assert len(shown) == found.batches * found.shown
    assert rms(shown) == pytest.approx(found.before.mean, rel=0.5)


def test_divergence_is_a_result(data: Arrays) -> None:
    found = small(data, lrs=[0.1, 1e6], seeds=1)
    plain = next(run for run in found.runs if run.lr == 1e6 and not run.normalized)
    assert plain.diverged
    assert plain.trained_steps < 30
    assert found.summary.plain.rates[1].diverged == 1
    assert found.summary.plain.rates[1].final.mean == pytest.approx(found.summary.chance)
    assert "diverged" in json.dumps(found.to_dict()["runs"])
    document = found.document()
    table = next(block for block in document.sections[1].blocks if isinstance(block, Table))
    assert table.rows[1][4] == "no, 1 of 1 diverged"


def test_a_sweep_in_which_everything_diverges_still_gives_a_report(data: Arrays) -> None:
    found = small(data, plain_model, lrs=[1e12, 1e15], seeds=1, optimizer="momentum")
    assert any("trains at none" in note for note in found.notes)
    assert "best learning rate" in " ".join(found.notes)
    assert "no" in str(found) or "Neither" in str(found)


def test_the_best_rate_at_the_edge_is_said(data: Arrays) -> None:
    found = small(data, lrs=[1e-4, 0.1], seeds=1)
    assert found.summary.plain.edge == "highest"
    assert any("without batch norm, 0.1, is the highest of the sweep" in note for note in found.notes)
    verdict = next(
        block for block in found.document().sections[0].blocks if "better?" in getattr(block, "label", "")
    )
    assert isinstance(verdict, Verdict)
    assert "is the highest rate tried" in verdict.text


@pytest.mark.parametrize(("after", "pairs"), [(2, 1), (3, 1), (6, 3)])
def test_ctrl_c_keeps_what_is_finished(data: Arrays, after: int, pairs: int) -> None:
    progress = Stop(after)
    found = small(data, progress=progress)
    assert found.interrupted
    assert progress.ended
    assert len(found.runs) == 2 * pairs
    assert f"Interrupted: {pairs} of 4 pairs" in found.document().incomplete
    assert json.loads(found.to_json())["interrupted"] is True
    assert (found.footing is None) == (pairs < 2)
    assert found.summary.seeds == (0,)


@pytest.mark.parametrize(("after", "watched"), [(8, 0), (9, 0), (10, 1), (11, 1)])
def test_ctrl_c_while_watching_keeps_every_pair(data: Arrays, after: int, watched: int) -> None:
    found = small(data, progress=Stop(after))
    assert found.interrupted
    assert len(found.runs) == 8
    assert found.summary.seeds == (0, 1)
    assert len(found.dynamics.courses if found.dynamics else ()) == 2 * watched
    assert f"watched in {watched} of 2 seeds" in found.document().incomplete


@pytest.mark.parametrize("after", [0, 1])
def test_ctrl_c_before_the_first_pair_is_raised(data: Arrays, after: int) -> None:
    progress = Stop(after)
    with pytest.raises(KeyboardInterrupt):
        small(data, progress=progress)
    assert progress.ended


def test_progress_is_told_everything(data: Arrays) -> None:
    class Record(Silent):
        calls: list[tuple[str, Any]]

        def __init__(self) -> None:
            self.calls = []

        def start(self, total_runs: int, describe: str, task: str) -> None:
            self.calls.append(("start", (total_runs, describe)))

        def run_started(self, label: str, normalized: bool, lr: float, seed: int) -> None:
            self.calls.append(("run", (normalized, lr, seed)))

        def step(self, step: int, steps: int, loss: float, score: float | None) -> None:
            self.calls.append(("step", (step, steps)))

        def finish(self) -> None:
            self.calls.append(("finish", None))

    record = Record()
    small(data, lrs=[0.1], seeds=1, steps=2, progress=record)
    assert record.calls == [
        ("start", (4, "deep-mlp on data")),
        ("run", (False, 0.1, 0)),
        ("step", (1, 2)),
        ("step", (2, 2)),
        ("run", (True, 0.1, 0)),
        ("step", (1, 2)),
        ("step", (2, 2)),
        # and once more, watched
        ("run", (False, 0.1, 0)),
        ("step", (1, 2)),
        ("step", (2, 2)),
        ("run", (True, 0.1, 0)),
        ("step", (1, 2)),
        ("step", (2, 2)),
        ("finish", None),
    ]
    quiet = Record()
    small(data, lrs=[0.1], seeds=1, steps=2, progress=quiet, dynamics=False)
    assert quiet.calls == [("start", (2, "deep-mlp on data")), *record.calls[1:7], ("finish", None)]


def test_a_model_with_batch_norm_is_compared_with_itself_without(data: Arrays) -> None:
    found = small(data, normalized_model)
    assert (found.setup.how, found.setup.layers) == ("remove", 1)
    assert found.footing is not None
    assert found.footing.layer == "1"
    assert found.footing.without is not None


def test_a_model_without_batch_norm_gets_it(data: Arrays) -> None:
    found = small(data, plain_model)
    assert (found.setup.how, found.setup.layers) == ("insert", 2)
    # each batch norm brings 2·16 parameters and takes a bias of 16
    assert found.setup.parameters[1] == found.setup.parameters[0] + 2 * 16


def test_shared_weights_start_equal(data: Arrays) -> None:
    seen: list[list[Tensor]] = []

    def optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
        values = list(parameters)
        seen.append([value.detach().clone() for value in values if value.dim() == 2])
        return torch.optim.SGD(values, lr=lr)

    small(data, plain_model, lrs=[0.01, 0.1], seeds=2, steps=1, optimizer=optimizer, dynamics=False)
    assert [len(weights) for weights in seen] == [3] * 8
    for start in (0, 4):
        for other in seen[start + 1 : start + 4]:
            assert all(torch.equal(a, b) for a, b in zip(seen[start], other, strict=True))
    assert not torch.equal(seen[0][0], seen[4][0])


def test_lazy_layers_get_their_shapes(data: Arrays) -> None:
    found = small(
        data, lambda: nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(3))
    )
    assert found.setup.how == "remove"
    assert found.setup.model == "the given model"


class Shuffled:
    """A loader that would give other batches at every pass, in one buffer that it fills again."""

    def __init__(self, x: Tensor, y: Tensor, size: int = 32) -> None:
        self.x, self.y, self.size = x, y, size
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        buffer = torch.empty(self.size, self.x.shape[1])
        for rows in torch.randperm(len(self.x)).split(self.size):
            x = buffer[: len(rows)].copy_(self.x[rows])
            yield x, self.y[rows]


def test_loaders_are_recorded_once_a_seed_and_replayed(data: Arrays) -> None:
    seen: dict[tuple[int, bool], list[Tensor]] = {}
    current: list[list[Tensor]] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and len(x) > 2:
                current[-1].append(x.clone())
            return x

    class Watch(Silent):
        def run_started(self, label: str, normalized: bool, lr: float, seed: int) -> None:
            current.append([])
            seen[seed, normalized] = current[-1]

        def run_finished(self, *args: Any) -> None:
            current.append([])

    train, test = Shuffled(*data[:2]), Shuffled(*data[2:])
    current.append([])
    found = small(
        (train, test),
        lambda: nn.Sequential(Spy(), normalized_model()),
        lrs=[0.1],
        steps=8,
        batch_size=None,
        progress=Watch(),
        dynamics=False,
    )
    assert train.passes == 4  # five batches a pass, eight steps, two seeds
    assert found.setup.batch_size is None
    for seed in (0, 1):
        assert len(seen[seed, False]) == len(seen[seed, True]) == 8
        assert all(torch.equal(a, b) for a, b in zip(seen[seed, False], seen[seed, True], strict=True))
    assert not torch.equal(seen[0, False][0], seen[1, False][0])
    rows = torch.cat(seen[0, False][:5])
    assert torch.equal(rows.sort(0).values, data[0].sort(0).values)


def test_data_loaders_with_a_generator_of_their_own_repeat(data: Arrays) -> None:
    generator = torch.Generator().manual_seed(5)
    train = DataLoader(TensorDataset(*data[:2]), batch_size=53, shuffle=True, generator=generator)
    test = DataLoader(TensorDataset(*data[2:]), batch_size=64)
    first, second = (small((train, test), plain_model, batch_size=None, lrs=[0.1], steps=6) for _ in range(2))
    assert first.runs == second.runs
    assert any("One-sample batches" in note and "(1 a seed)" in note for note in first.notes)


def test_document_has_verdicts_and_curves_on_its_first_screen(result: Comparison) -> None:
    document = result.document()
    first = document.sections[0].blocks
    assert [type(block) for block in first[:4]] == [Verdict] * 4
    # cautions, the curves, and what batch norm does
    assert [type(block) for block in first[4:] if not isinstance(block, Paragraph)] == [Figure]
    figures = [
        block for section in document.sections for block in section.blocks if isinstance(block, Figure)
    ]
    assert [figure.id for figure in figures] == [
        *("score", "rates", "batches", "distribution", "shift", "landscape", "smoothness", "loss")
    ]
    assert len({figure.id for figure in figures}) == len(figures)
    curve = next(
        trace for trace in figures[0].data if str(trace.get("name", "")).startswith("with batch norm")
    )
    best = [
        run.score for run in result.runs if run.normalized and run.lr == result.summary.normalized.best_lr
    ]
    np.testing.assert_allclose(curve["y"], np.mean(best, axis=0))
    assert figures[1].layout["xaxis"]["type"] == "log"
    notes = [block for block in document.sections[-1].blocks if isinstance(block, Paragraph)]
    assert any("chosen on the test set, by the same rule for both" in note.text for note in notes)


def test_tables_have_as_many_cells_as_columns(result: Comparison) -> None:
    tables = [
        block
        for section in result.document().sections
        for block in section.blocks
        if isinstance(block, Table)
    ]
    assert len(tables) == 4
    for table in tables:
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_save_writes_json_and_a_page(result: Comparison, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("plotly")
    assert result.save(tmp_path / "a.json").read_text(encoding="utf-8") == result.to_json() + "\n"
    page = result.save(tmp_path / "a.html").read_text(encoding="utf-8")
    assert "How much sooner?" in page
    with pytest.raises(batchnorm.InputError, match=r"\.html or \.json"):
        result.save(tmp_path / "a.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.json"]


def test_str_is_short_and_the_notebook_form_holds_the_verdict(result: Comparison) -> None:
    pytest.importorskip("jinja2")
    assert str(result).startswith(result.verdict)
    assert len(str(result).splitlines()) == 5
    assert "How much sooner?" in result._repr_html_()


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_optimizers(data: Arrays, optimizer: str) -> None:
    found = small(data, plain_model, lrs=[0.01], seeds=1, optimizer=optimizer)
    assert found.setup.optimizer == optimizer
    assert all(run.loss[-1] < run.loss[1] for run in found.runs)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_built_in_networks_on_digits(name: str) -> None:
    pytest.importorskip("sklearn")
    found = batchnorm.compare(name, "digits", lrs=[0.3], seeds=1, steps=4)
    assert found.setup.samples == (1347, 450)
    assert found.setup.layers == {"mlp": 3, "cnn": 4}[name]
    assert found.setup.batch_size == 64


def test_passed_model_is_never_trained(data: Arrays) -> None:
    shared = plain_model()
    before = copy.deepcopy(shared.state_dict())
    found = small(data, lambda: shared, steps=3)
    assert all(torch.equal(before[name], value) for name, value in shared.state_dict().items())
    assert any("same weights for every seed" in note for note in found.notes)
