"""`compare`: checks, the sweep, and what is finished when it ends or is stopped."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import _environment
from batchnorm._errors import InputError, InputTypeError, message
from batchnorm.comparison import measures
from batchnorm.comparison.data import Data, Loaders, resolve_data
from batchnorm.comparison.footing import Footing, measure_footing
from batchnorm.comparison.networks import RELU_RATES, network
from batchnorm.comparison.notes import method
from batchnorm.comparison.pairs import Pair, make_pair
from batchnorm.comparison.progress import Progress, Silent
from batchnorm.comparison.record import Batch, Replay, draw_batches, record_loader, record_test
from batchnorm.comparison.result import Comparison, Setup
from batchnorm.comparison.summary import final_accuracy, summarize
from batchnorm.comparison.training import MakeOptimizer, Run, optimizer_maker, train

__all__ = ["compare"]

TASKS = ("classification",)
STEPS = 500
BATCH_SIZE = 64
EVALUATIONS = 50  # a run; a speed-up is known to within steps / EVALUATIONS
# Momentum 0.9 makes each gradient count ten times; Adam's steps do not depend on the gradient's size.
RATE_FACTORS = {"momentum": 0.1}
ADAM_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
# Networks below these sizes run faster on one thread: the work per operation is less than the cost of sharing it.
SMALL_PARAMETERS, SMALL_BATCH = 1_000_000, 1_000_000


@dataclass(frozen=True, eq=False)
class _Plan:
    """The checked arguments of one comparison."""

    name: str
    describe: str
    factory: Callable[[], nn.Module]
    data: Data | Loaders
    lrs: tuple[float, ...]
    seeds: int
    steps: int
    batch_size: int | None
    optimizer: str
    make_optimizer: MakeOptimizer
    device: torch.device

    def batches(self, seed: int) -> Replay:
        if isinstance(self.data, Loaders):
            return record_loader(self.data, self.steps, seed, self.device)
        return draw_batches(self.data, self.batch_size or BATCH_SIZE, self.steps, seed, self.device)

    @property
    def every(self) -> int:
        return max(1, self.steps // EVALUATIONS)


class _Work:
    """What a comparison has finished so far; it outlives an interruption."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.pair: Pair | None = None
        self.dropped = 0
        self.kept: dict[bool, tuple[nn.Module, Run]] = {}
        self.footing: Footing | None = None
        self.same_weights = False


def compare(
    make_model: str | Callable[[], nn.Module],
    data: object,
    *,
    task: str = "classification",
    lrs: Iterable[float] | None = None,
    seeds: int = 3,
    steps: int | None = None,
    batch_size: int | None = None,
    optimizer: str | MakeOptimizer = "sgd",
    device: str | torch.device = "auto",
    progress: Progress | None = None,
) -> Comparison:
    """Train the same network with and without batch norm and measure what changes.

    For every seed the model is built once; its partner shares every weight that both have. Both see the same batches
    in the same order, at every learning rate. Batch norm is put before each hidden activation of a model that has
    none (`batchnorm.insert`), and taken out of a model that has it (`batchnorm.remove`), as in

        S. Ioffe, C. Szegedy: Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
        Shift, 2015, section 4.

    The global random generators are left as they were, and so is everything that was passed in.

    Args:
        make_model: a built-in network, "mlp" (three hidden layers of 100, sigmoid), "deep-mlp" (ten of 100, ReLU) or
            "cnn" (four convolutions, ReLU), or a function that returns a new model; it is called under a seeded
            generator. The model gives scores (N, classes).
        data: "digits" or "mnist5k"; four arrays or tensors (x_train, y_train, x_test, y_test) with integer labels; a
            `Data`; or (train_loader, test_loader), whose batches are recorded once a seed and replayed.
        task: "classification", trained with cross entropy.
        lrs: learning rates; by default seven half decades that suit network and optimizer.
        seeds: how many seeds; with one there are no intervals.
        steps: training steps of each run (500; 300 for "cnn").
        batch_size: samples a batch, at least 2 (64, or all samples if there are fewer). Not with loaders.
        optimizer: "sgd", "momentum" (0.9), "adam", or a function (parameters, lr) -> optimizer.
        device: "cpu", "cuda", ...; "auto" takes a GPU for a model or loaders of your own where there is one, and the
            CPU, which is faster for small networks, for the built-in ones.
        progress: told what is going on; see `batchnorm.comparison.Progress`.

    Returns:
        Curves, summary and verdicts. After Ctrl-C those of the finished pairs, with `interrupted` set.

    Raises:
        InputError: an option does not fit.
        DataError: the data cannot be used.
        ModelError: the model cannot be built, does not fit the data, or has no place for batch norm.
        MissingDependencyError: an optional package is needed and missing.
        KeyboardInterrupt: stopped before the first pair was finished.

    Example:
        >>> import batchnorm
        >>> result = batchnorm.compare("mlp", "digits", lrs=[0.3, 1.0, 3.0], seeds=1, steps=60)
        >>> result.summary.normalized.best > result.summary.plain.best
        True
    """
    plan = _plan(make_model, data, task, lrs, seeds, steps, batch_size, optimizer, device)
    measures.check_available()
    progress, work, interrupted = progress or Silent(), _Work(), False
    test = record_test(plan.data, plan.device)
    threads = torch.get_num_threads()
    with _generators_of(plan.data):
        try:
            progress.start(2 * len(plan.lrs) * plan.seeds, f"{plan.name} on {plan.data.name}")
            for seed in range(plan.seeds):
                _train_seed(plan, seed, test, work, progress)
        except KeyboardInterrupt:
            interrupted = True
            if len(work.runs) < 2:
                raise
        finally:
            threads_used = torch.get_num_threads()
            torch.set_num_threads(threads)
            progress.finish()
    return _result(plan, work, test, interrupted, threads_used)


def _train_seed(plan: _Plan, seed: int, test: list[Batch], work: _Work, progress: Progress) -> None:
    replay = plan.batches(seed)
    first = next(iter(replay))[0]
    before = work.pair
    pair = make_pair(plan.factory, first[:2], _classes(plan.data, replay, test), seed, plan.device)
    if seed == 0:
        work.pair, work.dropped = pair, replay.dropped
        if _small(pair, first):
            torch.set_num_threads(1)
    elif seed == 1 and before is not None:
        work.same_weights = _same_weights(before.plain, pair.plain)
    for lr in plan.lrs:
        runs = []
        for normalized in (False, True):
            model = copy.deepcopy(pair.normalized if normalized else pair.plain)
            runs.append(_train_one(plan, model, replay, test, normalized, lr, seed, progress))
            if seed == 0 and (normalized not in work.kept or _better(runs[-1], work.kept[normalized][1])):
                work.kept[normalized] = (model, runs[-1])
        work.runs += runs
    if seed == 0:
        model, run = work.kept[True]
        plain, plain_run = work.kept[False]
        partner = None if plain_run.diverged else plain
        work.footing = measure_footing(model, partner, pair.how, replay, lr=run.lr, seed=seed)
        work.kept.clear()


def _train_one(
    plan: _Plan,
    model: nn.Module,
    replay: Replay,
    test: list[Batch],
    normalized: bool,
    lr: float,
    seed: int,
    progress: Progress,
) -> Run:
    label = f"{plan.name} {'with' if normalized else 'without'} batch norm"
    progress.run_started(label, normalized, lr, seed)
    run = train(
        model,
        replay,
        test,
        normalized=normalized,
        lr=lr,
        seed=seed,
        every=plan.every,
        make_optimizer=plan.make_optimizer,
        progress=progress,
    )
    progress.run_finished(label, normalized, lr, seed, final_accuracy(run, _chance(test)), run.diverged)
    return run


def _better(run: Run, other: Run) -> bool:
    return not run.diverged and (other.diverged or run.accuracy[-1] > other.accuracy[-1])


def _result(plan: _Plan, work: _Work, test: list[Batch], interrupted: bool, threads: int) -> Comparison:
    summary = summarize(work.runs, _chance(test), sum(len(y) for _, y in test))
    if work.pair is None:
        raise RuntimeError("a finished pair of trainings without its networks")
    setup = Setup(
        model=plan.name,
        data=plan.data.name,
        describe=plan.describe,
        samples=_samples(plan.data),
        how=work.pair.how,
        layers=work.pair.changed,
        parameters=work.pair.parameters,
        optimizer=plan.optimizer,
        lrs=plan.lrs,
        seeds=plan.seeds,
        steps=plan.steps,
        batch_size=plan.batch_size,
        every=plan.every,
        device=str(plan.device),
    )
    notes = method(setup, summary, plan.data, work.pair, work.dropped, work.footing, work.same_weights)
    facts = _facts(plan.device, threads)
    return Comparison(setup, tuple(work.runs), summary, work.footing, notes, interrupted, facts)


def _plan(
    make_model: str | Callable[[], nn.Module],
    data: object,
    task: str,
    lrs: Iterable[float] | None,
    seeds: int,
    steps: int | None,
    batch_size: int | None,
    optimizer: str | MakeOptimizer,
    device: str | torch.device,
) -> _Plan:
    if task not in TASKS:
        raise InputError(message("task", got=repr(task), expected=f"one of {', '.join(TASKS)}"))
    seeds = _count("seeds", seeds)
    built_in = network(make_model) if isinstance(make_model, str) else None
    maker = optimizer_maker(optimizer)
    kind = optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", "custom")
    rates = _rates(lrs, built_in.rates if built_in else RELU_RATES, kind)
    steps = _count("steps", steps if steps is not None else built_in.steps if built_in else STEPS)
    batch_size = None if batch_size is None else _count("batch_size", batch_size)
    resolved = resolve_data(data)
    size = _batch_size(resolved, batch_size)
    chosen = _device(device, resolved, own_model=built_in is None)
    if built_in is not None:
        name, describe, factory = built_in.name, built_in.describe, _built_in_factory(make_model, resolved)
    else:
        name = getattr(make_model, "__name__", type(make_model).__name__)
        name = "the given model" if name == "<lambda>" else name
        describe, factory = "a model of the user's", make_model  # type: ignore[assignment]  # checked when called
    return _Plan(name, describe, factory, resolved, rates, seeds, steps, size, kind, maker, chosen)


def _built_in_factory(name: Any, data: Data | Loaders) -> Callable[[], nn.Module]:
    if isinstance(data, Loaders):
        raise InputError(
            message(
                "make_model",
                got=f"the built-in network {name} with loaders",
                expected="tensors, whose shapes tell how large the network must be",
                fix="Pass (x_train, y_train, x_test, y_test), or a function that builds your model.",
            )
        )
    shape, classes = tuple(data.x_train.shape[1:]), data.classes
    return lambda: network(name).build(shape, classes)


def _rates(lrs: Iterable[float] | None, default: tuple[float, ...], optimizer: str) -> tuple[float, ...]:
    if lrs is None:
        if optimizer == "adam":
            return ADAM_RATES
        return tuple(float(f"{lr * RATE_FACTORS.get(optimizer, 1):g}") for lr in default)
    try:
        rates = sorted({float(lr) for lr in lrs})
    except (TypeError, ValueError) as error:
        raise InputTypeError(message("lrs", got=repr(lrs), expected="several positive numbers")) from error
    if not rates:
        raise InputError(message("lrs", got="no learning rate", expected="at least one", fix="Give several."))
    for lr in rates:
        if not (math.isfinite(lr) and lr > 0):
            raise InputError(message("lrs", got=f"{lr:g}", expected="positive numbers"))
    return tuple(rates)


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputTypeError(message(name, got=repr(value), expected="a positive whole number"))
    if value < 1:
        raise InputError(message(name, got=value, expected="a positive whole number"))
    return value


def _batch_size(data: Data | Loaders, batch_size: int | None) -> int | None:
    if isinstance(data, Data):
        return min(BATCH_SIZE, len(data.x_train)) if batch_size is None else batch_size
    if batch_size is not None:
        raise InputError(
            message(
                "batch_size", got=f"{batch_size} with loaders", expected="none: loaders bring their batches"
            )
        )
    return None


def _device(device: str | torch.device, data: Data | Loaders, own_model: bool) -> torch.device:
    if device == "auto":
        own = own_model or isinstance(data, Loaders)
        return torch.device("cuda" if own and torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            message(
                "device",
                got=f"{device!r} ({reason})",
                expected="a device that is there",
                fix="Try device='cpu'.",
            )
        ) from error
    return chosen


def _samples(data: Data | Loaders) -> tuple[int, int] | None:
    return (len(data.x_train), len(data.x_test)) if isinstance(data, Data) else None


def _classes(data: Data | Loaders, replay: Replay, test: list[Batch]) -> int:
    if isinstance(data, Data):
        return data.classes
    return 1 + max(int(labels.max()) for labels in [*replay.y, *(y for _, y in test)])


def _chance(test: Sequence[Batch]) -> float:
    """The accuracy of always naming the most frequent class of the test set."""
    labels = torch.cat([y for _, y in test])
    return int(labels.bincount().max()) / len(labels)


def _small(pair: Pair, batch: Tensor) -> bool:
    return max(pair.parameters) <= SMALL_PARAMETERS and batch.numel() <= SMALL_BATCH


def _same_weights(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@contextmanager
def _generators_of(data: Data | Loaders) -> Iterator[None]:
    """Put back the state of generators that the user's loaders hold, so that a second comparison gives the same."""
    holders = [] if isinstance(data, Data) else [data.train, data.test]
    sources = [item for loader in holders for item in (loader, getattr(loader, "sampler", None))]
    generators = [getattr(source, "generator", None) for source in sources]
    states = [(g, g.get_state()) for g in generators if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _facts(device: torch.device, threads: int) -> dict[str, str]:
    found = _environment.describe()
    name = "cpu" if device.type == "cpu" else str(torch.device(device.type, device.index or 0))
    match = next((item for item in found.devices if item.name in (name, device.type)), None)
    return {
        "batchnorm": found.batchnorm,
        "torch": found.torch,
        "python": found.python,
        "system": found.system,
        "device": f"{device} ({match.model})" if match else str(device),
        "backend": match.backend if match else "",
        "threads": str(threads),
    }
