"""What several processes must agree on: how far they are, whether one failed, and the merged statistics.

Every process takes part in every exchange, whether it has a batch left or not, so uneven and empty shares are no
special case, and a process that fails takes the others along instead of letting them wait.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm._errors import InputTypeError, ModelError, message
from batchnorm.stats._moments import Moments, Pool
from batchnorm.stats._precision import block_scatter

__all__ = ["Alone", "Group", "Ranks", "Tally", "ranks_of"]

_HEADS = 6  # the numbers of a layer that are not per channel


@dataclass(frozen=True)
class Tally:
    """Totals over the processes after a round: who still had a batch, samples in this round, who failed."""

    active: int
    samples: int
    failed: int


class Alone:
    """One process."""

    rank, size = 0, 1

    def agree(self, fingerprint: int) -> None:
        """Nothing to compare with."""

    def tally(self, active: bool, samples: int, failed: bool) -> Tally:
        """The process's own numbers."""
        return Tally(int(active), samples, int(failed))

    def merged(self, pools: Sequence[Pool]) -> list[tuple[Pool, Tensor, int]]:
        """Each layer's pool, Σ of its blocks' scatter and their number."""
        return [(pool, block_scatter(pool), len(pool.blocks)) for pool in pools]


class Group:
    """Several processes, each with a share of the data."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.device = torch.device("cpu" if "gloo" in dist.get_backend(group) else "cuda")

    def agree(self, fingerprint: int) -> None:
        """Refuse to work where the processes are not about the same thing.

        Raises:
            ModelError: on every process.
        """
        own = torch.tensor([float(fingerprint)], dtype=torch.float64, device=self.device)
        if len({float(value) for value in self._gathered(own)}) > 1:
            raise ModelError(
                message(
                    "recalibrate",
                    got="models or options that differ from process to process",
                    expected="the same batch norms and options on all of them",
                    fix="Build the same model everywhere, or pass group=False to work alone.",
                )
            )

    def tally(self, active: bool, samples: int, failed: bool) -> Tally:
        """The sums over the processes."""
        numbers = torch.tensor([active, samples, failed], dtype=torch.int64, device=self.device)
        dist.all_reduce(numbers, group=self.group)
        return Tally(*(int(number) for number in numbers))

    def merged(self, pools: Sequence[Pool]) -> list[tuple[Pool, Tensor, int]]:
        """The pools of all processes merged in the order of their ranks, so that all get the same bits."""
        parts = [_unpacked(packed, pools) for packed in self._gathered(_packed(pools).to(self.device))]
        results = []
        for index, own in enumerate(pools):
            whole = parts[0][index]
            for part in parts[1:]:
                whole = _joined(whole, part[index])
            whole.blocks = own.blocks
            results.append(whole)
        scatter = torch.cat([block_scatter(pool) for pool in results]).to(self.device)
        dist.all_reduce(scatter, group=self.group)
        blocks = torch.tensor([len(pool.blocks) for pool in pools], device=self.device)
        dist.all_reduce(blocks, group=self.group)
        split = scatter.split([len(pool.values.mean) for pool in pools])
        return [
            (pool, part.to(pool.values.mean.device), int(number))
            for pool, part, number in zip(results, split, blocks, strict=True)
        ]

    def _gathered(self, own: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own, group=self.group)
        return parts


Ranks = Alone | Group


def ranks_of(group: Any | Literal[False] | None) -> Ranks:
    """The processes to work with.

    Raises:
        InputTypeError: `group` is no process group of which this process is a member.
    """
    if group is False or (group is None and not (dist.is_available() and dist.is_initialized())):
        return Alone()
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise InputTypeError(
            message(
                "group",
                got=type(group).__name__,
                expected="a process group that this process is in, None for the default one, or False for none",
            )
        )
    return Group(group) if dist.get_world_size(group) > 1 else Alone()


def _packed(pools: Sequence[Pool]) -> Tensor:
    parts = []
    for pool in pools:
        heads = (pool.values.count, pool.samples.count, pool.batches, pool.bad, pool.place, pool.repeated)
        parts.append(torch.tensor([float(head) for head in heads], dtype=torch.float64))
        rows = (pool.values.mean, pool.values.m2, pool.samples.mean, pool.samples.m2)
        parts += [row.cpu() for row in rows]
    return torch.cat(parts)


def _unpacked(packed: Tensor, like: Sequence[Pool]) -> list[Pool]:
    """What another process packed, as pools without blocks on the devices of our own."""
    pools, at = [], 0
    for own in like:
        channels, device = len(own.values.mean), own.values.mean.device
        pool = Pool(channels, device)
        end = at + _HEADS
        heads, rows = packed[at:end], packed[end : end + 4 * channels].view(4, channels).to(device)
        pool.values = Moments(heads[0].to(device), rows[0], rows[1])
        pool.samples = Moments(heads[1].to(device), rows[2], rows[3])
        pool.batches = int(heads[2])
        pool.bad = heads[3].to(device, torch.int64)
        pool.place, pool.repeated = int(heads[4]), bool(heads[5])
        pools.append(pool)
        at = end + 4 * channels
    return pools


def _joined(first: Pool, second: Pool) -> Pool:
    whole = Pool(len(first.values.mean), first.values.mean.device)
    whole.values = first.values.merged(second.values)
    whole.samples = first.samples.merged(second.samples)
    whole.batches = first.batches + second.batches
    whole.bad = first.bad if int(first.bad) >= 0 else second.bad
    whole.place = first.place if first.place >= 0 else second.place
    whole.repeated = first.repeated or second.repeated
    return whole
