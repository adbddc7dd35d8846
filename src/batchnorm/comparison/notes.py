"""How a comparison was made and what it cannot say, in plain sentences."""

import math
from typing import TYPE_CHECKING

from batchnorm.comparison.claims import all_diverged, untrained
from batchnorm.comparison.data import Data, Loaders
from batchnorm.comparison.dynamics import SAMPLES, STEP_LENGTHS, Dynamics
from batchnorm.comparison.footing import Footing
from batchnorm.comparison.pairs import Pair
from batchnorm.comparison.summary import JUDGED, Summary
from batchnorm.comparison.tasks import task_named

if TYPE_CHECKING:
    from batchnorm.comparison.result import Setup

__all__ = ["CAUTION", "dynamics_notes", "method"]

CAUTION = "Caution: "  # what a reader must know before the figures; it stands beside the verdicts


def method(
    setup: "Setup",
    summary: Summary,
    data: Data | Loaders,
    pair: Pair,
    dropped: int,
    footing: Footing | None,
    same_weights: bool,
    targets: tuple[float, float] | None = None,
) -> tuple[str, ...]:
    """The notes of a report: the set-up first, then how numbers were chosen, then warnings."""
    notes = [_network(setup), _training(setup, data), _selection(setup, summary), _intervals(setup, summary)]
    if footing is not None:
        notes.append(_footing(footing))
    if pair.skipped:
        notes.append(_skipped(pair.skipped, setup.how))
    notes += _warnings(setup, summary, dropped, same_weights)
    notes += _scaling_warning(data, footing) + _target_warning(data, targets)
    return (*notes, *pair.notes)


def dynamics_notes(dynamics: Dynamics | None, why_not: str) -> tuple[str, ...]:
    """How the networks were watched, or why they were not."""
    if dynamics is None:
        return (f"What happens during training was not measured: {why_not}.",) if why_not else ()
    layers = (
        f"{len(dynamics.layers)} weighted layers ({', '.join(dynamics.layers)})"
        if dynamics.layers
        else "no layer"
    )
    probes = len(dynamics.courses[0].points)
    lengths = ", ".join(f"{length:g}" for length in STEP_LENGTHS)
    return (
        f"During training: both networks of every seed were trained once more at the learning rate {dynamics.lr:g}, at "
        "which the plain network scores best, on the same batches. The distribution is that of "
        f"{dynamics.place}, in train mode, for the same {SAMPLES} test samples (or all, if there are fewer) at every "
        "evaluation; without batch norm that of the same place. The figure shows the channel whose drift is the middle "
        "one. Drift is the root mean square of the median's moves from one evaluation to the next, in units of half "
        "the distance between the 15th and the 85th percentile.",
        f"Internal covariate shift is ‖G − G′‖: for {layers} the gradient of the weights on a training batch before a "
        "step, G, and the same with all layers before this one already updated, G′ (Santurkar, Tsipras, Ilyas, Madry: "
        "How Does Batch Normalization Help Optimization?, 2018, definition 2.1). Smoothness: loss and gradient on the "
        f"batch at {lengths} times the learning rate along the negative gradient (their figure 4), whatever the "
        f"optimizer does. Both at {probes} steps, half of them in the first quarter of the training; of layers and "
        "steps the median counts, and seeds are compared in pairs.",
    )


def _network(setup: "Setup") -> str:
    verb = (
        "inserted before each hidden activation" if setup.how == "insert" else "removed from the given model"
    )
    plain, normalized = setup.parameters
    layers = "layer" if setup.layers == 1 else "layers"
    return (
        f"Network: {setup.model}, {setup.describe}. Batch norm was {verb} ({setup.layers} {layers}); a bias stands "
        f"only where no batch norm follows. {normalized:,} parameters with, {plain:,} without. Every weight that both "
        "networks have starts with the same value."
    )


def _skipped(count: int, how: str) -> str:
    kept = f"kept {'its' if count == 1 else 'their'} batch norm"
    verb = "got no batch norm" if how == "insert" else kept
    places = "1 further place" if count == 1 else f"{count} further places"
    return f"{places} {verb}; batchnorm.{how}(model).skipped says why."


def _training(setup: "Setup", data: Data | Loaders) -> str:
    if isinstance(data, Data):
        train, test = len(data.x_train), len(data.x_test)
        source = f"{setup.data}, {train:,} training and {test:,} test samples. {data.scaling}"
        batches = f"Batches of {setup.batch_size}, shuffled, without the incomplete last one"
    else:
        source = f"{setup.data}. The inputs are used as the loaders give them."
        batches = "The training loader's batches, recorded once a seed"
    return (
        f"Data: {source} {batches}: both networks see the same batches in the same order. {setup.steps} steps of "
        f"{setup.optimizer} at a constant learning rate, {task_named(setup.task).loss_name}; "
        f"evaluated every {setup.every} steps in eval mode, with running statistics."
    )


def _selection(setup: "Setup", summary: Summary) -> str:
    tried = ", ".join(f"{rate.lr:g}" for rate in summary.plain.rates)
    return (
        f"Learning rates tried: {tried}. Best and fastest rates and best {summary.words.metrics} are chosen "
        "on the test set, by the same rule for both networks. That is too optimistic as an estimate for new data, and "
        "a network that trains at more rates has more tries to be lucky. "
        f"How much sooner is judged at {100 * JUDGED:.0f} % of the plain network's best: the whole of it is the "
        "luckiest of many evaluations, which a second network as good would often miss. "
        f"Steps are counted in units of {setup.every}, from one evaluation to the next."
    )


def _intervals(setup: "Setup", summary: Summary) -> str:
    if summary.one_seed:
        return "One seed: there are no intervals, and every difference may be chance."
    return (
        f"Intervals are Student's, 95 %, over {len(summary.seeds)} seeds (weights and order of batches), of the paired "
        "difference where two networks are compared, of the logarithm where it is a ratio. They say nothing about "
        "another choice of test samples. 'No difference seen' means that the interval holds 0 "
        "(a ratio: 1), so that there may be none. Each "
        f"interval stands for itself: of {len(summary.plain.rates)} learning rates one may stand out by chance."
    )


def _footing(footing: Footing) -> str:
    text = (
        "Batch statistics: the input and output of the middle batch norm of the first seed's best trained network, in "
        f"train mode over the {footing.batches} batches of one epoch, in units of each channel's σ over all of them. "
        "That the output has the same mean and spread in every batch is what batch norm computes; the figure shows how "
        "much there was to remove, after the batch norms below had already done their part."
    )
    if footing.without is not None:
        text += " The network without batch norm is measured at the same place, after its own best training."
    return text


def _warnings(setup: "Setup", summary: Summary, dropped: int, same_weights: bool) -> list[str]:
    found = _edges(summary)
    late = [
        steps for steps in summary.targets[-1].plain_steps if steps is not None and steps > 0.9 * setup.steps
    ]
    if late:
        found.append(
            f"{CAUTION}without batch norm the network was still improving near the end ({len(late)} of "
            f"{len(summary.seeds)} seeds are at their best in the last tenth). More steps may narrow the gap."
        )
    if not summary.plain.trained_at:
        advice = (
            " Deep networks need He's initialization before ReLU, Xavier's before sigmoid: with PyTorch's default they "
            "may never start."
        )
        found.append(
            f"{CAUTION}the network without batch norm trains at none of the rates. "
            + untrained(summary, summary.plain)
            + ("" if all_diverged(summary, summary.plain) else advice)
        )
    if dropped:
        found.append(
            f"One-sample batches of the training loader ({dropped} a seed) were left out for both networks."
        )
    if same_weights:
        found.append(
            f"{CAUTION}the model starts with the same weights for every seed, so seeds differ in batches only."
        )
    return found


def _edges(summary: Summary) -> list[str]:
    """Best rates that lie at the end of the sweep, where a better one may be missed."""
    plain, normalized = summary.plain, summary.normalized
    found: list[str] = []
    if plain.edge == "only":
        found.append(
            f"{CAUTION}one learning rate was tried; each network may have a better one. Give a sweep."
        )
    elif plain.edge is not None:
        found.append(
            f"{CAUTION}the best learning rate without batch norm, {plain.best_lr:g}, is the {plain.edge} "
            "of the sweep; a better one may lie outside. Widen the sweep before you trust the comparison."
        )
    if normalized.edge in ("lowest", "highest"):
        found.append(
            f"The best learning rate with batch norm, {normalized.best_lr:g}, is the {normalized.edge} of "
            "the sweep; a better one may lie outside."
        )
    return found


def _target_warning(data: Data | Loaders, targets: tuple[float, float] | None) -> list[str]:
    """Loaders bring their targets as they are: far from unit scale no learning rate suits them."""
    if targets is None or isinstance(data, Data):
        return []
    mean, std = targets
    if abs(mean) <= 2 * std and 0.1 <= std <= 10:
        return []
    return [
        f"{CAUTION}the targets of the training loader have mean {mean:.3g} and standard deviation {std:.3g}, and are "
        "used as they are. Shift and scale them to 0 and 1, as is done for arrays, or no learning rate may suit."
    ]


def _scaling_warning(data: Data | Loaders, footing: Footing | None) -> list[str]:
    """Raw inputs handicap the plain network more than the normalized one; a reader must know."""
    if isinstance(data, Data):
        if not data.x_train.is_floating_point():
            return []
        mean, std = float(data.x_train.double().mean()), float(data.x_train.double().std())
    elif footing is not None and footing.inputs is not None:
        mean, std = footing.inputs
    else:
        return []
    if std > 0 and abs(mean) <= 2 * std and 0.1 <= std <= 10 and math.isfinite(mean):
        return []
    return [
        f"{CAUTION}the training inputs have mean {mean:.3g} and standard deviation {std:.3g}. Unscaled inputs hurt the "
        "network without batch norm more; standardize them for a fair fight."
    ]
