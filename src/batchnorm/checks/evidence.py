"""What rules judge by: collected once, then only read. No rule runs a model or touches one.

Numbers per channel are float64 tensors on the CPU. What could not be had is None or empty, and rules that need it
say nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Call", "Decay", "Evidence", "Fed", "Layer", "Neighbours", "Run", "Seen", "Stale"]

Mode = Literal["train", "eval"]


@dataclass(frozen=True, eq=False)
class Layer:
    """A batch norm as it stands. From a state dict alone, `eps`, `momentum`, `training` and the class are not known."""

    name: str
    channels: int
    kind: str = ""  # the class, "" from a state dict
    also: tuple[str, ...] = ()  # its other names, where it is used in several places
    eps: float | None = None
    momentum: float | None = None
    cumulative: bool = False  # momentum=None: the plain average
    training: bool | None = None
    tracks: bool = True
    mean: Tensor | None = None
    var: Tensor | None = None
    kept_in: torch.dtype | None = None  # the dtype of the running statistics
    updates: int | None = None  # num_batches_tracked
    weight: Tensor | None = None
    bias: Tensor | None = None
    weight_trained: bool = False
    bias_trained: bool = False
    frozen: bool = False  # by `batchnorm.freeze` or as a FrozenBatchNorm
    synchronized: bool = False
    ours: bool = False  # a class of this package
    holds: tuple[str, ...] = ()  # what it has that a conversion by another library would drop


@dataclass(frozen=True)
class Neighbours:
    """What the forward does right before and behind a layer; kinds are class names, "" where it is no layer."""

    before: str = ""
    before_kind: str = ""
    zeros: float = 0.0  # the share of that layer's weights that are exactly 0
    before_bias: bool = False  # a bias that only feeds this batch norm: `absorb_bias` would take it
    dropout_before: str = ""  # the dropout between it and what made its input
    dropout: float = 0.0  # the share that it drops
    unfoldable: str = ""  # why `fold` would leave it, "" if it folds
    padded_behind: str = ""  # the convolution straight behind it that pads with zeros


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer: of which batch, the how-manieth in it, and the moments of its input.

    `mean` and `var` (biased) are over samples and positions. `between` is the variance (unbiased) of the samples'
    means: for independent samples the mean of the batch scatters by between / samples.
    """

    batch: int
    site: int
    samples: int
    positions: int
    mean: Tensor
    var: Tensor
    between: Tensor


@dataclass(frozen=True, eq=False)
class Seen:
    """What a layer saw while batches ran: its calls in training and in eval mode, and what they looked like."""

    train: tuple[Call, ...] = ()
    eval: tuple[Call, ...] = ()
    shape: tuple[int, ...] = ()  # of the first input
    dtype: torch.dtype | None = None
    channels_last: bool = False
    place: int = 0  # how many other layers were called before it
    raw: bool = False  # its input is an input of the model
    training: bool = True  # whether it normalizes by the batch when the model is in training mode
    batch_in_eval: bool = False  # whether it does so when the model is in eval mode
    updates_forward: int | None = None  # of num_batches_tracked, in one forward
    updates_step: int | None = None  # in one forward and backward
    padding: float = 0.0  # the share of positions that hold what padding becomes
    slow: float | None = None  # time of this call over the fastest way to do it here
    faster: str = ""  # that way
    error: float | None = None  # of its backend against float64, relative to the largest value
    error_bound: float | None = None  # what is promised or usual
    instead: str = (
        ""  # what passes the same test: "batchnorm", this package's layer, or "reference", its backend
    )


@dataclass(frozen=True, eq=False)
class Fed:
    """One batch as it came."""

    samples: int
    refused: bool = False  # a layer had one value per channel and refused it, as it would in training


@dataclass(frozen=True, eq=False)
class Run:
    """The model as a whole on the batches."""

    batches: tuple[Fed, ...] = ()
    whole: bool = False  # whether these are all there are: the last one is the loader's last
    last: int | None = None  # samples of the loader's last batch, where that can be told
    # How far outputs move when the other samples of the batch are replaced, in the spread of the outputs.
    neighbours_eval: float | None = None
    neighbours_train: float | None = None
    output: tuple[int, ...] = ()  # the shape of the output that is compared
    output_dtype: torch.dtype | None = None
    # Outputs in training mode (dropout off) against eval mode, in the spread of the outputs; a number a batch.
    gap: tuple[float, ...] = ()
    pairs: bool = False  # most batches hold two views of the same samples, both of which the model gets
    no_backward: str = ""  # why the backward pass could not be run
    # The model's own input, cell by cell: in a training, no weight moves between two batches of it.
    inputs: tuple[Call, ...] = ()
    # Counts (batches, classes) of the labels beside the input, of more batches than were run where a loader's order
    # tells them.
    labels: Tensor | None = None


@dataclass(frozen=True)
class Decay:
    """Weight decay that an optimizer puts on a layer's parameters."""

    weight: float = 0.0
    bias: float = 0.0


@dataclass(frozen=True, eq=False)
class Stale:
    """An averaged model's statistics against the model's.

    `distance` is how far the mean is off, in σ, and `scale` by what factor σ is, 1 or more: in the channel in the
    middle, for a few dead channels may be off by any number.
    """

    updates: int | None  # of the averaged model
    behind: int | None
    distance: float
    scale: float
    initial: bool  # its statistics are 0 and 1 still, and the model's are not


@dataclass(frozen=True, eq=False)
class Evidence:
    """All of it. `layers` in the model's order; the mappings go by a layer's name."""

    layers: tuple[Layer, ...]
    training: bool | None = None  # the model's own mode
    learns: bool = False  # some parameter of the model requires a gradient
    compiled: bool = False  # by torch.compile, as a whole or in part
    from_state: bool = False  # there is a state dict and no model
    neighbours: Mapping[str, Neighbours] = field(default_factory=dict)
    untraced: str = ""  # why there is no graph
    seen: Mapping[str, Seen] = field(default_factory=dict)
    run: Run = field(default_factory=Run)
    decay: Mapping[str, Decay] = field(default_factory=dict)
    steps: int | None = None  # of the optimizer
    stale: Mapping[str, Stale] = field(default_factory=dict)
    world_size: int = 1

    def observed(self) -> Iterator[tuple[Layer, Seen]]:
        """The layers that batches have reached."""
        for layer in self.layers:
            seen = self.seen.get(layer.name)
            if seen is not None and (seen.train or seen.eval):
                yield layer, seen
