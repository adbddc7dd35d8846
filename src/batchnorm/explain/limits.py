"""What the story leaves out, and a real case where normalizing each day was the mistake."""

from collections.abc import Mapping
from types import MappingProxyType

from batchnorm.explain.network import Inside
from batchnorm.report.document import Block, Paragraph, Table

__all__ = ["BETWEEN_DAYS", "BIKESHARE", "SEEDS", "limits"]

# Measured by benchmarks/bikeshare.py; benchmarks/results/bikeshare.json has every seed, the versions and the machine.
# (how it was trained, statistics at the test) -> mean squared error of log(1 + bikers) on held-out days, and its
# standard deviation over seeds. The last of each is the control, a network without batch norm.
BIKESHARE: Mapping[tuple[str, str], tuple[float, float]] = MappingProxyType(
    {
        ("shuffled", "running"): (0.203, 0.017),
        ("shuffled", "recalibrated"): (0.181, 0.019),
        ("shuffled", "the day's own"): (0.670, 0.043),
        ("shuffled", "no batch norm"): (0.188, 0.022),
        ("by day", "running"): (1.000, 0.171),
        ("by day", "recalibrated"): (0.630, 0.100),
        ("by day", "the day's own"): (0.497, 0.045),
        ("by day", "no batch norm"): (0.204, 0.018),
    }
)
SEEDS = 5
BETWEEN_DAYS = 0.906


def limits(inside: Inside) -> list[Block]:
    """What the analogy hides, in plain words."""
    spread = max(inside.companies) - min(inside.companies)
    return [
        Paragraph(
            lead="The batch is a sample.",
            text="A day's mean depends on who came, so normalizing adds noise of its own; with two "
            "or three runners it is more noise than signal. In training such noise may even help a little, as other "
            "random disturbances do; it is no knowledge about the runners.",
        ),
        Paragraph(
            lead="Train and eval are two different functions.",
            text="The coach always has the day's field to compare with; a "
            f"network at inference uses running statistics. In the batch norm above the output of one digit moved by "
            f"up to {spread:.2g} with its company alone. Where the running statistics do not fit what the network was "
            "trained with, it fails in eval only.",
        ),
        Paragraph(
            lead="What all have in common is lost.",
            text="Had the whole squad got faster together, every day's mean would have "
            "taken it away. Here half were made to improve and half to decline, which suits batch norm. And σ takes "
            "more than the heat: that the runners' form truly lies closer together in the middle of the season is "
            "divided away too.",
        ),
        Paragraph(
            lead="Why batch norm helps training is another question.",
            text="Ioffe and Szegedy (2015, arXiv:1502.03167) said: it "
            "reduces internal covariate shift, the drifting of each layer's inputs. That is disputed: Santurkar, "
            "Tsipras, Ilyas and Mądry (How Does Batch Normalization Help Optimization?, 2018, arXiv:1805.11604) put "
            "shifting noise behind every batch norm and the networks trained as well; their explanation is a smoother "
            "loss. The runners show what batch norm computes, not why it helps.",
        ),
        Paragraph(
            lead="And a real case where a day per batch was the mistake.",
            text="Rented bikes in Washington, D.C. (Capital "
            f"Bikeshare, 2011), hour by hour. {BETWEEN_DAYS:.0%} of the temperature's variance lies between days, and "
            "how warm a day is decides how many ride. Batches of one whole day take exactly that away, and leave "
            "running statistics that fit no day. The columns say what a training batch was:",
        ),
        _table(),
        Paragraph(
            "Recalibrated: the running statistics replaced by the exact mean and variance of all training hours "
            "together. That mends the running statistics, not the weights, which only ever saw how an hour differs "
            "from its day. The last line is the same network without batch norm, which hardly minds the order of its "
            "batches: the harm is batch norm's. Batches must be drawn from all days, as a shuffling loader draws them.",
            small=True,
        ),
    ]


def _table() -> Table:
    names = {
        "running": "running statistics",
        "recalibrated": "recalibrated",
        "the day's own": "the test day's own",
        "no batch norm": "no batch norm at all",
    }
    trainings = {"shuffled": "24 shuffled hours", "by day": "one whole day"}
    rows = [
        (
            title,
            *(f"{mean:.3f} ± {spread:.3f}" for mean, spread in (BIKESHARE[way, kind] for way in trainings)),
        )
        for kind, title in names.items()
    ]
    caption = (
        f"Test error with each kind of statistics (mean squared error of log(1 + bikers), {SEEDS} seeds)"
    )
    return Table(("statistics at the test", *trainings.values()), rows, caption, numeric=(1, 2))
