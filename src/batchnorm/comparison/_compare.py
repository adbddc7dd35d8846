"""`compare`: the sweep, and what is finished when it ends or is stopped."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import _environment
from batchnorm._files import Interrupts
from batchnorm.comparison import measures
from batchnorm.comparison.data import Data, Loaders
from batchnorm.comparison.footing import Footing, measure_footing
from batchnorm.comparison.notes import dynamics_notes, method
from batchnorm.comparison.pairs import Pair, copied, given, raised
from batchnorm.comparison.plan import Plan, make_plan
from batchnorm.comparison.progress import Progress, Silent
from batchnorm.comparison.record import Batch, Replay, record_test
from batchnorm.comparison.result import Comparison, Setup
from batchnorm.comparison.summary import summarize
from batchnorm.comparison.told import train_told
from batchnorm.comparison.training import MakeOptimizer, Run
from batchnorm.comparison.watched import Watched

__all__ = ["compare"]

# Networks below these sizes run faster on one thread: the work per operation is less than the cost of sharing it.
SMALL_PARAMETERS, SMALL_BATCH = 1_000_000, 1_000_000


class _Work:
    """What a comparison has finished so far; it outlives an interruption."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.half: list[Run] = []  # of the pair that is not finished
        self.pair: Pair | None = None
        self.dropped = 0
        self.targets: tuple[float, float] | None = None
        self.kept: dict[bool, tuple[nn.Module, Run]] = {}
        self.footing: Footing | None = None
        self.same_weights = False
        self.watched: Watched | None = None

    def note(self, run: Run) -> None:
        """Keep a finished training; it counts once its partner is finished too."""
        self.half = [*self.half, run] if run.normalized else [run]
        if run.normalized:
            self.runs += self.half


def compare(
    make_model: str | Callable[[], nn.Module],
    data: object,
    *,
    task: str | None = None,
    lrs: Iterable[float] | None = None,
    seeds: int = 3,
    steps: int | None = None,
    batch_size: int | None = None,
    optimizer: str | MakeOptimizer = "sgd",
    device: str | torch.device = "auto",
    dynamics: bool = True,
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
            generator. The model gives scores (N, classes), for regression numbers (N, outputs).
        data: "digits", "mnist5k", "fashion-mnist", "segment", "segment-standardized", "bikeshare", or a folder with
            MNIST's files; four arrays or tensors (x_train, y_train, x_test, y_test); a `Data`; or (train_loader,
            test_loader), whose batches are recorded once a seed and replayed.
        task: "classification", trained with cross entropy on integer labels and judged by accuracy, or "regression",
            trained with the mean squared error and judged by R² = 1 − Σ(ŷ − y)²/Σ(y − ȳ)²; the targets of arrays are
            shifted and scaled by the training targets' mean and standard deviation. By default that of the named
            data, and classification for your own.
        lrs: learning rates; by default seven half decades that suit network and optimizer.
        seeds: how many seeds; with one there are no intervals.
        steps: training steps of each run (500; 1,000 for "mlp", 300 for "cnn").
        batch_size: samples a batch, at least 2 (64, or all samples if there are fewer). Not with loaders.
        optimizer: "sgd", "momentum" (0.9), "adam", or a function (parameters, lr) -> optimizer.
        device: "cpu", "cuda", ...; "auto" takes a GPU for a model or loaders of your own where there is one, and the
            CPU, which is faster for small networks, for the built-in ones.
        dynamics: train both networks of every seed once more, at the plain network's best learning rate, and watch the
            distribution of a hidden layer's input, the internal covariate shift and the smoothness of the loss.
        progress: told what is going on; see `batchnorm.comparison.Progress`.

    Returns:
        Curves, summary and verdicts. After Ctrl-C those of the finished pairs, with `interrupted` set; an error after
        the first finished pair is raised with the same as its attribute `comparison`.

    Raises:
        InputError: an option does not fit.
        InputTypeError: an option or an array is of another type.
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
    # The caller may be in a block without gradients; training is not.
    with torch.inference_mode(False), torch.enable_grad():
        plan = make_plan(make_model, data, task, lrs, seeds, steps, batch_size, optimizer, device, dynamics)
        measures.check_available()
        with _generators_of(plan.data), Interrupts() as interrupts:
            return _compared(plan, progress or Silent(), interrupts)


def _compared(plan: Plan, progress: Progress, interrupts: Interrupts) -> Comparison:
    work = _Work()
    stopped: KeyboardInterrupt | Exception | None = None
    test = record_test(plan.data, plan.device)
    threads = torch.get_num_threads()
    try:
        progress.start(
            2 * (len(plan.lrs) + plan.dynamics) * plan.seeds,
            f"{plan.name} on {plan.data.name}",
            plan.task.name,
        )
        for seed in range(plan.seeds):
            _train_seed(plan, seed, test, work, progress)
        if plan.dynamics:
            lr = summarize(work.runs, plan.task.name, plan.guess(test), 1).plain.best_lr
            work.watched = Watched(plan, lr, test)
            work.watched.run(progress)
        interrupts.hold()
    except (KeyboardInterrupt, Exception) as reason:
        interrupts.hold()
        if not work.runs:
            raise
        stopped = reason
    finally:
        threads_used = torch.get_num_threads()
        torch.set_num_threads(threads)
        progress.finish()
    result = _result(plan, work, test, stopped, threads_used)
    if isinstance(stopped, Exception):
        # Not returned: who does not look would take the part for the whole.
        stopped.comparison = result  # type: ignore[attr-defined]
        stopped.add_note(
            f"{len(result.runs)} finished trainings: see the attribute `comparison` of this error."
        )
        raise stopped
    # Ctrl-C while the result was put together: everything is there, and whoever called must stop.
    return replace(result, interrupted=True) if interrupts.pressed else result


def _train_seed(plan: Plan, seed: int, test: list[Batch], work: _Work, progress: Progress) -> None:
    replay = plan.batches(seed)
    first = next(iter(replay))[0]
    before = work.pair
    pair = plan.pair(seed, replay, test)
    if seed == 0:
        work.pair, work.dropped, work.targets = pair, replay.dropped, replay.target_scale
        if _small(pair, first):
            torch.set_num_threads(1)
    elif seed == 1 and before is not None:
        work.same_weights = _same_weights(before.plain, pair.plain)
    for lr in plan.lrs:
        for normalized in (False, True):
            model = copied(pair.normalized if normalized else pair.plain)
            run = train_told(plan, model, replay, test, normalized, lr, seed, progress, note=work.note)
            if seed == 0 and (normalized not in work.kept or _better(run, work.kept[normalized][1])):
                work.kept[normalized] = (model, run)
    if seed == 0:
        work.footing = _footing(work, pair, replay, seed)
        work.kept.clear()


def _footing(work: _Work, pair: Pair, replay: Replay, seed: int) -> Footing | None:
    model, run = work.kept[True]
    plain, plain_run = work.kept[False]
    for net in (model, plain):
        net.register_forward_pre_hook(_give_copies)
    try:
        partner = None if plain_run.diverged else plain
        return measure_footing(model, partner, pair.how, replay, lr=run.lr, seed=seed)
    except Exception:
        # A model that can be trained but not observed, such as one that keeps what it computed and cannot be copied
        # any more: the comparison stands without this part, and the report says nothing of it.
        return None


def _give_copies(model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(given(model, value) if isinstance(value, Tensor) else value for value in args)


def _better(run: Run, other: Run) -> bool:
    return not run.diverged and (other.diverged or run.score[-1] > other.score[-1])


def _result(
    plan: Plan, work: _Work, test: list[Batch], stopped: KeyboardInterrupt | Exception | None, threads: int
) -> Comparison:
    summary = summarize(work.runs, plan.task.name, plan.guess(test), sum(len(y) for _, y in test))
    if work.pair is None:
        raise RuntimeError("a finished pair of trainings without its networks")
    setup = Setup(
        model=plan.name,
        task=plan.task.name,
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
    notes = method(
        setup, summary, plan.data, work.pair, work.dropped, work.footing, work.same_weights, work.targets
    )
    seen, why_not = (None, "") if work.watched is None else (work.watched.result(), work.watched.why_not)
    notes += dynamics_notes(seen, why_not)
    facts = _facts(plan.device, threads)
    interrupted, error = stopped is not None, raised(stopped) if isinstance(stopped, Exception) else ""
    return Comparison(setup, tuple(work.runs), summary, work.footing, seen, notes, interrupted, error, facts)


def _samples(data: Data | Loaders) -> tuple[int, int] | None:
    return (len(data.x_train), len(data.x_test)) if isinstance(data, Data) else None


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
