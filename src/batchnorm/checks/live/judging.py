"""The rules during training: evidence of the last looks, and findings that are told once."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from batchnorm._walk import Changes
from batchnorm.checks._check import judged, none_in
from batchnorm.checks._collect import decay_of, steps_of
from batchnorm.checks._fix import known, marked, repair
from batchnorm.checks._host import on_host
from batchnorm.checks._state import norms_of
from batchnorm.checks.evidence import Call, Evidence, Fed, Layer, Run, Seen
from batchnorm.checks.finding import SEVERITIES, Finding
from batchnorm.checks.findings import Findings
from batchnorm.checks.live.looking import Look
from batchnorm.checks.rule import Need, Rule

__all__ = ["Judge", "Told"]

_LOOKS = 8  # whose calls are evidence
# Batches of the model's input, which is no matter of the weights, so that older ones still count.
_INPUTS = 32
# What a few looks may show that the next ones do not: measured on batches, or near a bound.
_WAVERING = {"BN005", "BN007", "BN008", "BN103", "BN105", "BN106", "BN107", "BN108", "BN110"}
# What needs the network's code or runs of its own.
_LEFT = {
    **dict.fromkeys(("BN012", "BN013", "BN018"), "batchnorm.check(model)"),
    "BN017": "batchnorm.check(model, averaged=...)",
    **dict.fromkeys(
        ("BN101", "BN102", "BN104", "BN109", "BN112", "BN113"), "batchnorm.check(model, batches=...)"
    ),
}


@dataclass
class Told:
    """A finding in its latest words, the step at which it was first told, and the last at which it was there."""

    finding: Finding
    first: int
    last: int
    gone: bool = False
    absent: int = 0  # for how many looks it has not been there

    @property
    def places(self) -> set[str]:
        """The layers that it is about."""
        return {self.finding.module, *self.finding.also}


class Judge:
    """All rules that a training gives evidence for.

    What layers and optimizer are by themselves is told at once; what is measured on batches, when two looks in a row
    have it. It has gone when two looks in a row lack it.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Mapping[str, Rule],
        optimizer: torch.optim.Optimizer | None,
        *,
        world_size: int,
        unheard: str = "",  # why calls of layers are not looked at
        held: bool = False,  # a wrapper holds the model's parameters
    ) -> None:
        self.told: list[Told] = []
        self._model, self._optimizer = model, optimizer
        self._rules = {code: rule for code, rule in rules.items() if code not in _LEFT}
        self._left = {code: why for code, why in _LEFT.items() if code in rules}
        self._world_size, self._unheard = world_size, unheard
        self._looks: deque[Look] = deque(maxlen=_LOOKS)
        self._inputs: deque[Call] = deque(maxlen=_INPUTS)
        self._before: list[Finding] = []  # what the last look found
        self._heard: dict[tuple[str, str], int] = {}  # the worst that was told, by code and layer
        self._held, self._layers = held, known(model, ())
        self._latest: Findings | None = None
        # SGD does not count its steps; from a fresh model on they can be counted here.
        self._fresh = all(not layer._buffers.get("num_batches_tracked") for _, layer in norms_of(model))

    def glance(self, input: Call | None) -> None:
        """Take in the moments of a batch of the model's input, on its device."""
        if input is not None:
            self._inputs.append(input)

    def judge(self, look: Look, steps: int) -> list[Finding]:
        """Take in a look, after so many steps; what is told for the first time."""
        self._looks.append(look)
        given = self._given()
        if any(each.seen for each in self._looks):
            given.add("batches")
        evidence = self._evidence(look.layers, steps)
        latest = judged(evidence, self._rules, given=frozenset(given), model=None)
        found = [each for each in latest if not _may_be_rare(each)]
        self._layers = known(self._model, [layer.name for layer in look.layers])
        self._latest, before, self._before = latest, self._before, found
        return self._sorted_out(found, before, look.step)

    def judge_end(self, layers: Sequence[Layer], step: int, steps: int) -> list[Finding]:
        """Judge how the layers stand at the end, by the rules that need no batches; what is told for the first time."""
        if self._looks:
            # In eval mode, should validation have come last.
            training = {layer.name: layer.training for layer in self._looks[-1].layers}
            layers = [replace(each, training=training.get(each.name, each.training)) for each in layers]
        rules = {code: rule for code, rule in self._rules.items() if "batches" not in rule.needs}
        latest = judged(
            self._evidence(tuple(layers), steps), rules, given=frozenset(self._given()), model=None
        )
        # Nothing is known anew of what is measured on batches.
        left = [each.finding for each in self.told if each.finding.code not in rules and not each.gone]
        self._latest = self._latest or latest
        self._layers = known(self._model, [layer.name for layer in layers])
        return self._sorted_out([*latest, *left], self._before, step)

    def findings(self, more: Sequence[str] = ()) -> Findings:
        """All that has been told, those that have gone among them, of which the notes say so. `more` notes."""
        latest = self._latest
        notes = [] if latest is None else list(latest.notes)
        if not norms_of(self._model):
            notes = [none_in(self._model)]
        notes += [
            f"{each.finding.code} at {each.finding.module or 'the model'} was last seen at step {each.last:,}"
            for each in self.told
            if each.gone
        ]
        notes += more
        if self._unheard:
            notes.append(
                f"the model is {self._unheard}: weights and running statistics are looked at, calls are not"
            )
        model, layers = self._model, self._layers
        current = marked(model, [each.finding for each in self.told if not each.gone], layers)
        here = {id(each) for each in current}

        def mend(some: Sequence[Finding], inplace: bool) -> Changes:
            # What has gone is as it should be by now.
            left = [each for each in some if id(each) in here]
            return repair(model, left, layers, inplace=inplace, parameters=not self._held)

        return Findings(
            [*current, *(each.finding for each in self.told if each.gone)],
            layers=len(self._layers) if self._looks else len(norms_of(self._model)),
            ran=() if latest is None else latest.ran,
            not_run=self._left if latest is None else dict(sorted({**latest.not_run, **self._left}.items())),
            notes=notes,
            repair=mend,
        )

    def _given(self) -> set[Need]:
        """What rules may need, without batches."""
        given: set[Need] = {"model"}
        if self._optimizer is not None:
            given.add("optimizer")
        if self._world_size > 1:
            given.add("world_size")
        return given

    def _evidence(self, layers: tuple[Layer, ...], steps: int) -> Evidence:
        looks, optimizer = list(self._looks), self._optimizer
        counted = None if optimizer is None else steps_of(optimizer)
        if counted is None and optimizer is not None and self._fresh:
            counted = steps
        return Evidence(
            layers,
            training=True,
            compiled=self._unheard == "compiled",
            learns=any(p.requires_grad for p in self._model.parameters()),
            seen={
                layer.name: seen
                for layer in layers
                if (seen := _merged(looks, layer.name, layer.channels)) is not None
            },
            run=Run(
                tuple(Fed(look.samples) for look in looks),
                inputs=_alike(self._inputs),
            ),
            decay={} if optimizer is None else decay_of(norms_of(self._model), optimizer),
            steps=counted,
            world_size=self._world_size,
        )

    def _sorted_out(self, found: list[Finding], before: Sequence[Finding], step: int) -> list[Finding]:
        """What of it is new, or worse than it was told; what was told and is there no more is marked."""
        taken: list[Finding] = []
        kept: list[Told] = []
        new: list[Finding] = []
        for told in self.told:
            alike = [each for each in found if _same(each, told.finding)]
            free = [each for each in alike if each not in taken]
            if alike and not free:
                continue  # what was told in two findings has become one
            told.absent = 0 if free else told.absent + 1
            told.gone = told.absent > 1
            if free:
                taken.append(free[0])
                told.last = step
                if not _worse(free[0], told.finding) or _sure(free[0], before):
                    told.finding = free[0]
            kept.append(told)
        kept += [Told(each, step, step) for each in found if each not in taken and _sure(each, before)]
        for each in (told.finding for told in kept if told.last == step):
            places, severity = {each.module, *each.also}, SEVERITIES.index(each.severity)
            worst = [heard for place in places if (heard := self._heard.get((each.code, place))) is not None]
            if not worst or severity < min(worst):
                new.append(each)
            for place in places:
                self._heard[each.code, place] = min(severity, self._heard.get((each.code, place), severity))
        self.told = kept
        return new


def _sure(finding: Finding, before: Sequence[Finding]) -> bool:
    """Whether it needs no second look, or the last one has had it, and as bad."""
    return finding.code not in _WAVERING or any(
        _same(finding, other) and not _worse(finding, other) for other in before
    )


def _same(one: Finding, other: Finding) -> bool:
    """Of one rule, and about a layer in common."""
    return one.code == other.code and bool({one.module, *one.also} & {other.module, *other.also})


def _worse(one: Finding, other: Finding) -> bool:
    return SEVERITIES.index(one.severity) < SEVERITIES.index(other.severity)


def _merged(looks: Sequence[Look], name: str, channels: int) -> Seen | None:
    """What a layer saw in the last looks; None if the last of them did not see it."""
    every = [(place, seen) for place, look in enumerate(looks) if (seen := look.seen.get(name)) is not None]
    # A layer that has been replaced by one of another width begins anew.
    every = [(place, seen) for place, seen in every if seen.train and seen.train[0].mean.numel() == channels]
    if not every:
        return None
    latest = every[-1][1]
    return replace(
        latest,
        train=tuple(replace(call, batch=place) for place, seen in every for call in seen.train),
        raw=all(seen.raw for _, seen in every),
        padding=sum(seen.padding for _, seen in every) / len(every),
    )


def _may_be_rare(finding: Finding) -> bool:
    """A channel that is 0 in the last looks and was not before them: a pixel that has ink in one digit of 250."""
    return finding.code == "BN108" and not finding.evidence["differ"]


def _alike(inputs: deque[Call]) -> tuple[Call, ...]:
    """The batches of the model's input that have as many cells as the last one, on the CPU from now on."""
    numbers = iter(on_host([part for call in inputs for part in (call.mean, call.var, call.between)]))
    moved = [replace(call, mean=next(numbers), var=next(numbers), between=next(numbers)) for call in inputs]
    inputs.clear()
    inputs.extend(moved)
    return tuple(call for call in moved if call.mean.numel() == moved[-1].mean.numel())
