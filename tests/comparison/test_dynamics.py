"""The watched trainings: that watching changes nothing, that its numbers are the definitions', and what is said."""

import json
import math
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.comparison import Comparison, dynamics
from batchnorm.comparison.dynamics import Course, Point, Watch, place_of, put_together
from batchnorm.comparison.dynamics_report import training_section
from batchnorm.comparison.gradients import Probe, Start, covariate_shift, smoothness
from batchnorm.comparison.pairs import Pair, copied, make_pair
from batchnorm.comparison.progress import Silent
from batchnorm.comparison.record import Replay
from batchnorm.comparison.tasks import task_named
from batchnorm.comparison.training import optimizer_maker, train
from batchnorm.report.document import Figure, Paragraph, Table

CPU = torch.device("cpu")
CLASSES = task_named("classification")


def batches(count: int = 12) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, 16, 5, generator=generator)
    return [(part, (part[:, 0] * part[:, 1] > 0).long() + (part[:, 2] > 0).long()) for part in x]


def replay() -> Replay:
    x, y = zip(*batches(), strict=True)
    return Replay(list(x), list(y), CPU, epoch=12)


def plain_model() -> nn.Module:
    layers: list[nn.Module] = []
    for width in (5, 12, 12):
        layers += [nn.Linear(width, 12), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(12, 3))


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make_pair(plain_model, batches()[0][0][:2], CLASSES, 3, 0, CPU)


def trained(pair: Pair, normalized: bool, watched: bool, lr: float = 0.2) -> tuple[Any, nn.Module, Watch]:
    places = place_of(copied(pair.normalized), pair.how, batches()[0][0][:2])
    assert places is not None
    watch = Watch(places[normalized], batches()[1][0], CLASSES, lr, 12, 0)
    model = copied(pair.normalized if normalized else pair.plain)
    run = train(
        model,
        replay(),
        batches()[:2],
        CLASSES,
        normalized=normalized,
        lr=lr,
        seed=0,
        every=3,
        make_optimizer=optimizer_maker("sgd"),
        progress=Silent(),
        watch=watch if watched else None,
    )
    return run, model, watch


@pytest.mark.parametrize("normalized", [False, True])
def test_a_watched_training_is_the_same_training(pair: Pair, normalized: bool) -> None:
    seen, model, watch = trained(pair, normalized, watched=True)
    unseen, other, _ = trained(pair, normalized, watched=False)
    assert seen.score == unseen.score
    assert seen.loss[1:] == unseen.loss[1:]
    for (name, first), second in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(first, second), name
    assert len(watch.course(normalized).points) == 12


def test_the_shift_of_the_first_step_is_the_definition(pair: Pair) -> None:
    """Overwrite the weights of the layers before, and call backward."""
    watch = trained(replace(pair, plain=without_dropout(pair.plain)), False, watched=True)[2]
    model = without_dropout(copied(pair.plain))
    x, y = batches()[0]
    gradients = {name: g for name, g in zip(names(model), grads(model, x, y), strict=True)}
    old = copied(model).state_dict()
    new = {name: value - 0.2 * gradients[name] for name, value in old.items()}
    found = []
    for layer in ("3", "6", "9"):
        before = [name for name in names(model) if int(name.split(".")[0]) < int(layer)]
        model.load_state_dict({name: new[name] if name in before else old[name] for name in old})
        moved = dict(zip(names(model), grads(model, x, y), strict=True))[f"{layer}.weight"]
        found.append(float((gradients[f"{layer}.weight"] - moved).norm()))
    assert watch.groups == tuple(group for group in watch.groups if group.name in ("3", "6", "9"))
    point = watch.course(False).points[0]
    assert point.step == 1
    assert point.shift == pytest.approx(sorted(found)[1], rel=1e-4)


class Counted(nn.Module):
    """Counts the forward passes of all copies of a model, and the copies."""

    passes: ClassVar[int] = 0
    copies: ClassVar[int] = 0

    def forward(self, x: Tensor) -> Tensor:
        Counted.passes += 1
        return x

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        Counted.copies += 1
        return Counted()


def test_the_gradient_before_a_step_is_computed_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy of the model; passes: one before the step, one for each layer, and one for each step length."""
    x, y = batches()[0]
    model = nn.Sequential(Counted(), *copied(pair.normalized))
    watch = Watch(None, x, CLASSES, 0.1, 2, 0)
    for step in (1, 2):
        monkeypatch.setattr(Counted, "passes", 0)
        monkeypatch.setattr(Counted, "copies", 0)
        watch.before(step, model)
        watch.after(step, model, x, y)
    assert (Counted.passes, Counted.copies) == (1 + len(watch.groups) + len(dynamics.STEP_LENGTHS), 1)
    assert len(watch.groups) == 3


@pytest.mark.parametrize("normalized", [False, True])
def test_a_shared_gradient_gives_the_same_bits_as_one_for_each(pair: Pair, normalized: bool) -> None:
    model, (x, y) = pair.normalized if normalized else pair.plain, batches()[0]
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    watch = Watch(None, x, CLASSES, 0.1, 1, 5)
    watch.before(1, model)
    moved = copied(model)
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    watch.after(1, moved, x, y)
    probe = Probe(moved, x, y, nn.functional.cross_entropy, 6)
    loss, everything = probe(old, probe.trained)
    weights = [name for group in watch.groups for name in group.weight]
    again, alone = Probe(moved, x, y, nn.functional.cross_entropy, 6)(old, weights)
    assert loss == again
    assert all(torch.equal(alone[name], everything[name]) for name in weights)
    shifts = covariate_shift(Start(probe, old, loss, alone), dict(moved.named_parameters()), watch.groups)
    smooth = smoothness(probe.start(old), [0.1 * length for length in dynamics.STEP_LENGTHS])
    seen = watch.course(normalized).points[0]
    assert seen.shift == sorted(shift.difference for shift in shifts)[1] > 0
    assert (seen.loss, seen.low, seen.high) == (loss, smooth.loss_low, smooth.loss_high)
    assert (seen.change, seen.beta) == (smooth.relative, smooth.beta)


def without_dropout(model: nn.Module) -> nn.Module:
    model = copied(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def grads(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    loss = nn.functional.cross_entropy(model(x), y)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_the_percentiles_are_those_of_the_place(pair: Pair) -> None:
    course = trained(pair, True, watched=True)[2].course(True)
    places = place_of(copied(pair.normalized), pair.how, batches()[0][0][:2])
    assert places is not None
    model = copied(pair.normalized).train()
    seen: list[Tensor] = []
    model.get_submodule(places[True].path).register_forward_hook(lambda *call: seen.append(call[2]))
    torch.manual_seed(0)
    model(batches()[1][0])
    all_channels = np.quantile(seen[0].detach().numpy().astype(np.float64), [0.15, 0.5, 0.85], axis=0).T
    assert course.steps == (0, 3, 6, 9, 12)
    assert min(np.abs(all_channels - np.array(course.percentiles[0])).max(1)) < 1e-6
    assert course.drift > 0


def test_both_networks_are_looked_at_in_the_same_place(pair: Pair) -> None:
    places = place_of(copied(pair.normalized), pair.how, batches()[0][0][:2])
    assert places is not None
    plain, normalized = places
    assert isinstance(pair.normalized.get_submodule(normalized.path), batchnorm.BatchNorm1d)
    assert isinstance(pair.plain.get_submodule(plain.path), nn.Linear)
    assert plain.side == "output"


def test_a_model_without_layers_before_has_no_shift() -> None:
    watch = Watch(None, batches()[0][0], CLASSES, 0.1, 1, 0)
    model = nn.Linear(5, 3)
    watch.before(1, model)
    watch.after(1, model, *batches()[0])
    course = watch.course(False)
    assert watch.groups == ()
    assert math.isnan(course.points[0].shift)
    assert course.points[0].beta > 0
    assert math.isnan(course.drift)


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 500])
def test_steps_looked_at_lie_within_the_training_and_thicker_at_the_beginning(steps: int) -> None:
    watch = Watch(None, batches()[0][0], CLASSES, 0.1, steps, 0)
    probed = sorted(watch._probed)
    assert (probed[0], probed[-1]) == (1, steps)
    assert len(probed) <= dynamics.PROBES
    if steps == 500:
        assert len(probed) == dynamics.PROBES
        assert sum(step <= 125 for step in probed) == 10


def point(step: int, factor: float, cosine: float) -> Point:
    return Point(step, 2.0, 1.0, 1.0 + factor, factor, factor, factor, factor, cosine)


def course(normalized: bool, seed: int, factor: float, cosine: float = 0.5) -> Course:
    points = tuple(point(step, factor * scale, cosine) for step, scale in ((1, 3.0), (2, 1.0), (3, 0.2)))
    curve = ((-1.0, 0.0, 1.0), (-1.0, factor, 1.0))
    return Course(normalized, seed, (0, 3), curve, factor, points)


def courses(ratio: float, seeds: int = 3, spread: float = 0.01, cosine: float = 0.8) -> list[Course]:
    found = []
    for seed in range(seeds):
        size = 1 + seed / 10
        found += [course(False, seed, size), course(True, seed, size * ratio * (1 + spread * seed), cosine)]
    return found


def test_medians_of_the_steps_are_compared_in_pairs() -> None:
    found = put_together(0.1, "the place", ("3",), courses(0.25))
    for name in ("drift", "shift", "relative", "variation", "change", "beta"):
        item = found.measure(name)
        assert item.plain == pytest.approx((1.0, 1.1, 1.2))
        assert item.change is not None
        assert item.change.mean == pytest.approx(0.25 * (1.01 * 1.02) ** (1 / 3))
    cosine = found.measure("cosine")
    assert cosine.change is not None
    assert cosine.change.mean == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("ratio", "spread", "expected"),
    [
        (0.25, 0.01, "4.0× less (3.9 to 4.1×)"),
        (4.0, 0.01, "4.0× more (3.9 to 4.1×)"),
        (1.0, 0.01, "no difference seen"),
        (0.5, 9.0, "too few seeds to tell"),
    ],
)
def test_every_answer_is_told_whichever_way_it_comes_out(ratio: float, spread: float, expected: str) -> None:
    section = training_section(put_together(0.1, "the place", ("3",), courses(ratio, spread=spread)))
    texts = [block.text for block in section.blocks if isinstance(block, Paragraph)]
    assert len(texts) == 3
    assert all(expected in text for text in texts)
    table = next(block for block in section.blocks if isinstance(block, Table))
    assert all(expected in row[3] for row in table.rows if "cosine" not in row[0])


def test_one_seed_claims_no_interval() -> None:
    section = training_section(put_together(0.1, "the place", ("3",), courses(0.25, seeds=1)))
    text = " ".join(block.text for block in section.blocks if isinstance(block, Paragraph))
    assert "4.0× less in one seed" in text
    assert " to 4" not in text.replace("0.5 to 4 times", "")


def test_infinite_and_missing_numbers_make_no_comparison() -> None:
    burst = [replace(item, points=(point(1, math.inf, math.nan),) * 3) for item in courses(0.25)]
    found = put_together(0.1, "the place", ("3",), burst)
    assert found.measure("beta").change is None
    assert found.measure("cosine").change is None
    blocks = training_section(found).blocks
    assert any("not comparable" in block.text for block in blocks if isinstance(block, Paragraph))
    lost = [replace(item, points=(), percentiles=(), drift=math.nan) for item in courses(0.25)]
    blocks = training_section(put_together(0.1, "", (), lost)).blocks
    assert not [block for block in blocks if isinstance(block, Figure)]


def test_the_median_counts_an_infinite_step_and_no_missing_one() -> None:
    one = replace(
        course(True, 0, 1.0), points=tuple(point(1, value, 0.5) for value in (1.0, math.nan, math.inf, 2.0))
    )
    found = put_together(0.1, "", (), [course(False, 0, 1.0), one])
    assert found.measure("beta").normalized == (2.0,)


class Jumpy(nn.Module):
    """Fails when its weights are replaced by tensors that are no parameters, as looking into it asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.last.weight, nn.Parameter):
            raise RuntimeError("not a parameter")
        return self.last(self.second(self.first(x)))


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    return x, y, x[:64], y[:64]


def test_a_model_that_cannot_be_watched_is_compared_all_the_same() -> None:
    found = batchnorm.compare(Jumpy, data(), lrs=[0.1], seeds=2, steps=4, batch_size=16)
    assert found.dynamics is None
    assert len(found.runs) == 4
    assert any("not measured: RuntimeError: not a parameter" in note for note in found.notes)


@pytest.mark.parametrize("values", [(3.0, 1.0, 2.0), (4.0, 1.0, 2.0, 3.0)])
def test_a_median_is_the_middle_or_the_mean_of_the_two(values: tuple[float, ...]) -> None:
    one = replace(course(True, 0, 1.0), points=tuple(point(1, value, 0.5) for value in values))
    found = put_together(0.1, "", (), [course(False, 0, 1.0), one])
    assert found.measure("shift").normalized == (np.median(values),)


def test_a_diverged_training_supports_no_claim() -> None:
    lost = courses(0.25)
    lost[2] = replace(lost[2], diverged=True)
    found = put_together(0.1, "the place", ("3",), lost)
    assert all(item.change is None for item in found.compared)
    first = next(block for block in training_section(found).blocks if isinstance(block, Paragraph))
    assert "0 with batch norm and 1 without diverged" in first.text


def test_huge_numbers_stay_readable() -> None:
    blocks = training_section(put_together(0.1, "the place", ("3",), courses(1e22))).blocks
    text = " ".join(block.text for block in blocks if isinstance(block, Paragraph))
    assert "1e+22× more" in text
    assert not any(len(word) > 40 for word in text.split())


@pytest.fixture(scope="module")
def result() -> Comparison:
    return batchnorm.compare(plain_model, data(), lrs=[0.05, 0.2], seeds=2, steps=24, batch_size=16)


def test_a_comparison_watches_both_at_the_plain_networks_best_rate(result: Comparison) -> None:
    found = result.dynamics
    assert found is not None
    assert found.lr == result.summary.plain.best_lr
    assert [(item.normalized, item.seed) for item in found.courses] == [
        (False, 0), (True, 0), (False, 1), (True, 1),
    ]  # fmt: skip
    assert all(len(item.percentiles) == len(item.steps) == 25 for item in found.courses)
    assert any("definition 2.1" in note for note in result.notes)
    saved = json.loads(result.to_json())["dynamics"]
    assert saved["lr"] == found.lr
    assert {item["name"] for item in saved["compared"]} == {
        *("drift", "shift", "relative", "cosine", "variation", "change", "beta")
    }


def test_it_can_be_left_out(result: Comparison) -> None:
    short = batchnorm.compare(
        plain_model, data(), lrs=[0.05, 0.2], seeds=2, steps=24, batch_size=16, dynamics=False
    )
    assert short.dynamics is None
    assert short.runs == result.runs
    assert not any("During training" in note for note in short.notes)


def test_the_section_has_its_figures(result: Comparison) -> None:
    assert result.dynamics is not None
    figures = [block for block in training_section(result.dynamics).blocks if isinstance(block, Figure)]
    assert [figure.id for figure in figures] == ["distribution", "shift", "landscape", "smoothness"]
    for figure in figures:
        assert figure.alt
        assert all(len(trace["x"]) == len(trace["y"]) > 1 for trace in figure.data)


def test_a_plain_network_that_always_diverges_is_watched_until_then() -> None:
    found = batchnorm.compare(plain_model, data(), lrs=[1e9], seeds=1, steps=6, batch_size=16)
    assert found.dynamics is not None
    assert found.document()
