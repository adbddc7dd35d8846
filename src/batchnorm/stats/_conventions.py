"""What the frameworks call the parts of a batch norm layer, and what their numbers mean: data, with its sources."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from batchnorm._errors import InputError, message

__all__ = ["NAMES", "Convention", "convention_of"]

Path = tuple[str, ...]


@dataclass(frozen=True)
class Convention:
    """One framework's batch norm. A path is where a part stands below its layer's own name.

    Their momentum is the weight of the old average, in all of them: ours is 1 − theirs.
    """

    name: str
    weight: Path
    bias: Path
    mean: Path
    var: Path
    layout: Literal["flat", "nested", "haiku", "equinox"]
    momentum: str
    default_momentum: float | None
    eps: str
    default_eps: float
    has_weight: str
    has_bias: str
    # What else belongs to a layer, which no layer of ours has.
    dropped: tuple[Path, ...] = ()
    # The names under which the whole tree holds parameters and statistics.
    collections: tuple[str, str] | None = None
    # Whether the running variance is Σ(x − μ)²/(n − 1), as ours, or that over n.
    unbiased: bool = False
    # How many batches the average has seen, where it is corrected by that number: hidden = average·(1 − mᵗ).
    counter: Path | None = None
    # Whether `mean` and `var` lead to the hidden values (Equinox) or to the corrected averages (Haiku).
    hidden: bool = False
    # True where the statistics hold nothing yet.
    empty: Path | None = None
    # γ without β, and β without γ.
    weight_alone: bool = True
    bias_alone: bool = True
    # Options with which another entry of the table holds, and what they are worth in this one.
    switches: Mapping[str, object] = field(default_factory=dict)


_KERAS: dict[str, Any] = {
    "weight": ("gamma",),
    "bias": ("beta",),
    "mean": ("moving_mean",),
    "var": ("moving_variance",),
    "layout": "flat",
    "momentum": "momentum",
    "default_momentum": 0.99,
    "eps": "epsilon",
    "default_eps": 1e-3,
    "has_weight": "scale",
    "has_bias": "center",
    # Batch renormalization: used in training alone.
    "dropped": (
        ("moving_stddev",),
        ("renorm_mean",),
        ("renorm_mean_weight",),
        ("renorm_stddev",),
        ("renorm_stddev_weight",),
    ),
}

_FLAX: dict[str, Any] = {
    "weight": ("scale",),
    "bias": ("bias",),
    "mean": ("mean",),
    "var": ("var",),
    "layout": "nested",
    "momentum": "momentum",
    "default_momentum": 0.99,
    "eps": "epsilon",
    "default_eps": 1e-5,
    "has_weight": "use_scale",
    "has_bias": "use_bias",
}

_EQUINOX: dict[str, Any] = {
    "weight": ("weight",),
    "bias": ("bias",),
    "layout": "equinox",
    "momentum": "momentum",
    "default_momentum": 0.99,
    "eps": "eps",
    "default_eps": 1e-5,
    "has_weight": "channelwise_affine",
    "has_bias": "channelwise_affine",
    "weight_alone": False,
    "bias_alone": False,
}

# docs/frameworks.md says where each of these stands in the frameworks' own source.
_TABLE = (
    Convention("keras", **_KERAS),
    # The fused kernel, which TensorFlow takes for images by default, hands out the unbiased variance.
    Convention("tensorflow", unbiased=True, switches={"fused": True}, **_KERAS),
    Convention("tensorflow", switches={"fused": False}, **_KERAS),
    Convention(
        "tf-slim",
        unbiased=True,
        switches={"fused": True},
        **{**_KERAS, "momentum": "decay", "default_momentum": 0.999},
    ),
    Convention(
        "tf-slim", switches={"fused": False}, **{**_KERAS, "momentum": "decay", "default_momentum": 0.999}
    ),
    Convention("flax", collections=("params", "batch_stats"), **_FLAX),
    Convention("nnx", **_FLAX),
    Convention(
        "haiku",
        weight=("scale",),
        bias=("offset",),
        mean=("mean_ema", "average"),
        var=("var_ema", "average"),
        layout="haiku",
        momentum="decay_rate",
        default_momentum=None,
        eps="eps",
        default_eps=1e-5,
        has_weight="create_scale",
        has_bias="create_offset",
        dropped=(("mean_ema", "hidden"), ("var_ema", "hidden"), ("var_ema", "counter")),
        collections=("params", "state"),
        counter=("mean_ema", "counter"),
    ),
    Convention(
        "equinox",
        mean=("batch_state_index", "0"),
        var=("batch_state_index", "1"),
        counter=("batch_counter",),
        hidden=True,
        switches={"mode": "batch"},
        **_EQUINOX,
    ),
    Convention(
        "equinox",
        mean=("ema_state_index", "0"),
        var=("ema_state_index", "1"),
        empty=("ema_first_time_index",),
        switches={"mode": "ema"},
        **_EQUINOX,
    ),
)

NAMES = tuple(dict.fromkeys(convention.name for convention in _TABLE))


def convention_of(framework: str, options: dict[str, Any]) -> Convention:
    """The framework's convention; takes the options out that choose among several.

    Raises:
        InputError: an unknown framework, or no such convention.
    """
    those = [convention for convention in _TABLE if convention.name == framework]
    if not those:
        raise InputError(
            message("framework", got=repr(framework), expected="one of " + ", ".join(map(repr, NAMES)))
        )
    for name, default in those[0].switches.items():
        wanted = options.pop(name, default)
        chosen = [convention for convention in those if convention.switches[name] == wanted]
        if not chosen:
            known = " or ".join(repr(convention.switches[name]) for convention in those)
            raise InputError(message(name, got=repr(wanted), expected=known))
        those = chosen
    return those[0]
