"""One training of a comparison, told to whoever shows the progress."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from batchnorm.comparison.plan import Plan
from batchnorm.comparison.progress import Progress
from batchnorm.comparison.record import Batch, Replay
from batchnorm.comparison.summary import final_score
from batchnorm.comparison.training import Run, train

if TYPE_CHECKING:
    from batchnorm.comparison.dynamics import Watch

__all__ = ["train_told"]


def train_told(
    plan: Plan,
    model: nn.Module,
    replay: Replay,
    test: list[Batch],
    normalized: bool,
    lr: float,
    seed: int,
    progress: Progress,
    *,
    note: Callable[[Run], None] | None = None,
    watch: "Watch | None" = None,
) -> Run:
    """Train `model` in place as the plan says, and tell `progress` before and after.

    `note` gets the finished training before anything else can be interrupted; `watch` may look on.
    """
    label = f"{'with' if normalized else 'without'} batch norm{'' if watch is None else ', watched'}"
    progress.run_started(label, normalized, lr, seed)
    run = train(
        model,
        replay,
        test,
        plan.task,
        normalized=normalized,
        lr=lr,
        seed=seed,
        every=plan.every,
        make_optimizer=plan.make_optimizer,
        progress=progress,
        watch=watch,
    )
    if note is not None:
        note(run)
    progress.run_finished(label, normalized, lr, seed, final_score(run, plan.guess(test)), run.diverged)
    return run
