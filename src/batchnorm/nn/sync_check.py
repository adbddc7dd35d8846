"""`check_sync`: who calls which synchronized layer, told over a side channel, so that a mistake is no hang."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from batchnorm._errors import InputError, InputTypeError, ModelError, message
from batchnorm.nn.sync import SyncBatchNorm

__all__ = ["check_sync"]

_FIX = "Every process of the group must call the same layers in the same order, all of them in training mode."
# Added to a meeting's counter by who gives up; more than there are processes.
_GIVEN_UP = -(1 << 40)
# Seconds for the rest to come once a difference is seen: they make the message complete, and no more.
_GRACE = 0.3


@contextmanager
def check_sync(model: nn.Module, timeout: float = 30.0) -> Iterator[None]:
    """Let synchronized batch norms say who is missing, and where, instead of waiting for it.

    Inside the `with` block each `SyncBatchNorm` of the model tells the other processes its name before it exchanges
    anything with them, forward and backward, and waits for theirs. Where they differ, or one does not come in time,
    every process that waits at a layer gets an error with ranks and layers: a process in eval mode, layers called in
    another order, a batch that only some have, an exception in one process. For finding a hang, and wrong to leave
    on: an exchange costs several messages over the store of torch.distributed more, and a wait on the host. Outside
    the block nothing is left of it, in the layers neither.

    All processes enter the block, equally often. In eval mode a layer waits for nobody, so one process may evaluate
    alone. Without torch.distributed there is nothing to check. Run the model uncompiled.

    Args:
        model: any module; wrapped for distributed training or not.
        timeout: seconds to wait for the others at each layer.

    Raises:
        InputError: the model has no `SyncBatchNorm`, or `timeout` is not positive.
        InputTypeError: `model` is no module.
        ModelError: in forward and backward, on every process: what differs or who is missing.

    Example:
        >>> import torch, batchnorm
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), batchnorm.SyncBatchNorm(4))
        >>> with batchnorm.check_sync(model, timeout=10):
        ...     model(torch.randn(8, 3)).square().mean().backward()
    """
    layers = _layers(model, timeout)
    channels: dict[tuple[int, ...], _Channel] = {}
    hooks = []
    if dist.is_available() and dist.is_initialized():
        # The store counts how often this process has entered: those that do the same have the same number.
        store = dist.PrefixStore("batchnorm/check_sync", dist.distributed_c10d._get_default_store())
        number = store.add(f"entries/{dist.get_rank()}", 1)
        for name, layer in layers:
            if dist.get_world_size(layer.process_group) < 2:
                continue
            ranks = tuple(dist.get_process_group_ranks(layer.process_group or dist.group.WORLD))
            if ranks not in channels:
                channels[ranks] = _Channel(ranks, dist.PrefixStore(str(number), store), timeout)
            watcher = _Watcher(name, channels[ranks])
            hooks.append(layer.register_forward_pre_hook(watcher.before, with_kwargs=True))
            hooks.append(layer.register_forward_hook(watcher.behind))
    why = ""
    try:
        yield
    except BaseException as error:
        why = f"after {type(error).__name__}"
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for channel in channels.values():
            channel.leave(why)


def _layers(model: object, timeout: float) -> list[tuple[str, SyncBatchNorm]]:
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            message("check_sync: model", got=type(model).__name__, expected="a torch.nn.Module")
        )
    if not timeout > 0:
        raise InputError(message("check_sync: timeout", got=timeout, expected="seconds above 0"))
    layers = [(name, each) for name, each in model.named_modules() if isinstance(each, SyncBatchNorm)]
    if not layers:
        raise InputError(
            message(
                "check_sync: model",
                got="one without batchnorm.SyncBatchNorm",
                expected="synchronized batch norms",
                fix="Make them: batchnorm.convert(model, 'sync').",
            )
        )
    return layers


class _Watcher:
    """The hooks of one layer."""

    def __init__(self, name: str, channel: "_Channel") -> None:
        self.name = name
        self.channel = channel
        self.calls = 0

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell of a call in eval mode; in training, meet the others."""
        if not module.training:
            self.channel.note(self.name)
            return
        self.calls += 1
        self.channel.meet(self._words("forward", args[0] if args else kwargs.get("input")))

    def behind(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Meet the others again before the gradient goes through."""
        if module.training and output.requires_grad:
            words = self._words("backward", output)
            output.register_hook(lambda grad: self.channel.meet(words))

    def _words(self, phase: str, x: Any) -> list[str]:
        """What must be the same everywhere, and what is good to know."""
        channels = x.shape[1] if isinstance(x, Tensor) and x.dim() > 1 else "no"
        dtype = str(getattr(x, "dtype", "no dtype")).removeprefix("torch.")
        return [f"{self.name!r} in {phase} with {channels} channels", f"call {self.calls}, {dtype}"]


class _Channel:
    """What the processes of one group tell each other over the store; every process makes the same one."""

    def __init__(self, ranks: tuple[int, ...], store: dist.Store, timeout: float) -> None:
        self.ranks, self.rank, self.timeout = ranks, dist.get_rank(), timeout
        members = hashlib.sha256(str(ranks).encode()).hexdigest()[:16]
        self.store = dist.PrefixStore(members, store)
        self.meetings = 0
        self.noted: list[str] = []
        self.last = ""
        self.left = False

    def note(self, layer: str) -> None:
        """A call in eval mode, which waits for nobody; told to who waits for us."""
        self.noted.append(layer)
        self.store.set(f"eval/{self.rank}", json.dumps(self.noted[-3:]))

    def leave(self, why: str) -> None:
        """The block has ended."""
        self.left = True
        self.store.set(f"left/{self.rank}", f"left check_sync {why}".rstrip())

    def meet(self, words: list[str]) -> None:
        """Say what comes now, hear the others, and go on if all say the same.

        Raises:
            ModelError: they do not, or one is missing.
        """
        if self.left:
            return
        meeting, self.meetings = self.meetings, self.meetings + 1
        self.store.set(f"{meeting}/{self.rank}", json.dumps([*words, self.noted[-3:]]))
        heard = self._hear(meeting, words[0])
        if any(what[0] != words[0] for what in heard.values()):
            raise ModelError(self._differ(heard))
        # Who gives up and who goes on must agree: all go, or none. The counter says who was first.
        missing = [rank for rank in self.ranks if rank not in heard]
        if missing:
            # If someone has gone on, all have come in the meantime, this one's view was old.
            if self.store.add(f"{meeting}/go", _GIVEN_UP) <= _GIVEN_UP:
                raise ModelError(self._missing(words, missing))
        elif self.store.add(f"{meeting}/go", 1) <= 0:
            raise ModelError(self._late(words))
        self._forget(meeting - 2)
        self.last = words[0]
        if self.noted:
            self.noted = []
            self.store.set(f"eval/{self.rank}", "[]")

    def _hear(self, meeting: int, mine: str) -> dict[int, list[Any]]:
        """What every process says that comes in time."""
        heard = {}
        until = time.monotonic() + self.timeout
        for rank in self.ranks:
            key = f"{meeting}/{rank}"
            left = max(until - time.monotonic(), 0.01)  # 0 would be no limit at all
            try:
                self.store.wait([key], timedelta(seconds=left))
            except RuntimeError:  # the store's time-out
                continue
            heard[rank] = json.loads(self.store.get(key))
            if heard[rank][0] != mine:
                until = min(until, time.monotonic() + _GRACE)
        return heard

    def _forget(self, meeting: int) -> None:
        """Everybody has been at the meeting after this one, so nobody reads it any more."""
        if meeting >= 0:
            self.store.delete_key(f"{meeting}/{self.rank}")
            if self.rank == self.ranks[0]:
                self.store.delete_key(f"{meeting}/go")

    def _differ(self, heard: dict[int, list[Any]]) -> str:
        said: dict[str, list[int]] = {}
        for rank, (what, more, noted) in heard.items():
            said.setdefault(f"{what} ({more}){_noted(noted)}", []).append(rank)
        missing = [rank for rank in self.ranks if rank not in heard]
        texts = [f"{_ranks(ranks)}: {what}" for what, ranks in said.items()]
        texts += [f"rank {rank}: nothing yet" for rank in missing]
        return message("SyncBatchNorm", got="; ".join(texts), expected="the same on every process", fix=_FIX)

    def _missing(self, words: list[str], missing: Sequence[int]) -> str:
        whereabouts = "; ".join(f"rank {rank} {self._whereabouts(rank)}" for rank in missing)
        return message(
            f"SyncBatchNorm {words[0]} ({words[1]})",
            got=f"no {_ranks(missing)} within {self.timeout:g} s ({whereabouts})",
            expected=f"all of {_ranks(self.ranks)}",
            fix=_FIX,
        )

    def _whereabouts(self, rank: int) -> str:
        if self.store.check([f"eval/{rank}"]):
            noted = json.loads(self.store.get(f"eval/{rank}"))
            if noted:
                return f"has called {_in_eval(noted)}"
        if self.store.check([f"left/{rank}"]):
            return f"has {self.store.get(f'left/{rank}').decode()}"
        return f"was last at {self.last}" if self.last else "has called none of these layers"

    def _late(self, words: list[str]) -> str:
        return message(
            f"SyncBatchNorm {words[0]} ({words[1]})",
            got=f"rank {self.rank} after others had waited {self.timeout:g} s and given up",
            expected="all processes within that time",
            fix="Make the timeout of check_sync longer, if this process has only been slow.",
        )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _in_eval(layers: Sequence[str]) -> str:
    return f"{', '.join(map(repr, layers))} in eval mode"


def _noted(layers: Sequence[str]) -> str:
    return f", after a call of {_in_eval(layers)}" if layers else ""
